"""The KV cache: pages as pytrees on the device, and who owns which page, on the host."""

from alaya_jax.cache.allocator import PageAllocator
from alaya_jax.cache.paged import (
    NO_PAGE,
    UNUSED,
    PagedKV,
    PageTable,
    append,
    append_layer,
    copy_pages,
    page_zeros,
    read_tokens,
    write_pages,
)

__all__ = [
    "NO_PAGE",
    "UNUSED",
    "PageAllocator",
    "PageTable",
    "PagedKV",
    "append",
    "append_layer",
    "copy_pages",
    "page_zeros",
    "read_tokens",
    "write_pages",
]
