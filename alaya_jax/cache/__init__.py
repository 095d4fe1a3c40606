"""The KV cache: pages as pytrees on the device, and who owns which page, on the host."""

from alaya_jax.cache.allocator import PageAllocator
from alaya_jax.cache.paged import (
    NO_PAGE,
    PagedKV,
    PageTable,
    append,
    copy_pages,
    read_tokens,
    write_pages,
)

__all__ = [
    "NO_PAGE",
    "PageAllocator",
    "PageTable",
    "PagedKV",
    "append",
    "copy_pages",
    "read_tokens",
    "write_pages",
]
