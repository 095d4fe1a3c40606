"""The shapes at which `aot` compiles `block_sparse_prefill`: Llama 3's, and each feature once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from alaya_jax.pallas_kernels.block_sparse_prefill import (
    QUERY_BLOCK,
    Prefill,
    block_sparse_prefill,
)
from alaya_jax.pallas_kernels.compile_case import CompileCase, Work


def case(
    label: str,
    *,
    tokens: int = 4096,
    cached: int = 0,
    kv_heads: int = 8,
    groups: int = 4,
    dim: int = 128,
    size: int = 16,
    block_kv: int = 128,
    listed: int | None = None,
    of_heads: bool = False,
    beta: bool = False,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> CompileCase:
    """A chunk after `cached` tokens; each block of queries attends to `listed` blocks of keys."""

    def array(*shape: int, kind: jax.typing.DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    heads, pages = kv_heads * groups, (cached + tokens) // size
    pool = array(kv_heads, pages + 1, size, dim, kind=dtype)
    options: dict[str, Any] = {}
    if listed is not None:
        per = (1, heads if of_heads else kv_heads, tokens // QUERY_BLOCK)
        options["blocks"] = array(*per, listed)
        options |= {"block_counts": array(*per), "block_kept": array(*per)}
    if beta:
        options["beta"] = array(heads, kind=jnp.float32)
    arguments = (array(1, tokens, heads, dim, kind=dtype), pool, pool, array(1, pages))
    return CompileCase(
        name=f"block_sparse_prefill {label}: T {tokens:,} behind {cached:,}, K {kv_heads} "
        f"G {groups} D {dim} Z {size} {jnp.dtype(dtype).name}, tiles of {block_kv}",
        call=functools.partial(_call, block_kv=block_kv),
        arguments=(*arguments, array(1), array(1), options),
        kernels=("block_sparse_prefill",),
        claims=frozenset({"wgmma", "tma", "fences"}),
        work=work(tokens, cached, kv_heads, groups, dim, listed and listed * block_kv),
    )


def _call(*arguments: Any, block_kv: int) -> Prefill:
    *arrays, options = arguments
    return block_sparse_prefill(*arrays, **options, block_kv=block_kv, implementation="mosaic_gpu")


def work(
    tokens: int, cached: int, kv_heads: int, groups: int, dim: int, listed: int | None
) -> Work:
    """Two matmuls over the causal pairs or the listed keys; keys, values, q and out once each."""
    heads = kv_heads * groups
    pairs = tokens * listed if listed else tokens * cached + tokens * (tokens + 1) / 2
    return Work(
        bytes=2.0 * dim * (2 * kv_heads * (cached + tokens) + 2 * heads * tokens),
        flops=4.0 * heads * dim * pairs,
    )


def cases() -> list[CompileCase]:
    """The cases to compile."""
    return [
        case("dense", tokens=16384),
        case("dense chunk", tokens=4096, cached=126976),
        case("lists of kv heads", cached=126976, listed=50),
        case("lists of heads", cached=126976, listed=50, of_heads=True),
        case("skipping", cached=126976, beta=True),
        case("lists and skipping", cached=126976, listed=50, beta=True, dtype=jnp.float16),
        case("dense, narrow tiles", block_kv=64, size=64),
        case("Llama 3.2 1B", dim=64, size=32, beta=True),
    ]
