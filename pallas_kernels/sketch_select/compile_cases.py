"""The shapes at which `aot` compiles `sketch_select`: Llama 3's, and each feature once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from alaya_jax.pallas_kernels.compile_case import CompileCase, Work
from alaya_jax.pallas_kernels.paged_decode import PagedDecode
from alaya_jax.pallas_kernels.paged_decode import compile_cases as paged_decode
from alaya_jax.pallas_kernels.paged_decode import paged_decode as decode
from alaya_jax.pallas_kernels.sketch_select import (
    Codes,
    Query,
    Selected,
    Signs,
    sketch_select,
)


def case(
    label: str,
    keys: int,
    *,
    batch: int = 1,
    kv_heads: int = 8,
    groups: int = 4,
    dim: int = 128,
    size: int = 16,
    lse: bool = False,
    bits: float | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> CompileCase:
    """A scan of `keys` keys of each sequence; `bits`: signs a channel, None for 4-bit fields."""

    def array(*shape: int, kind: jax.typing.DTypeLike = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, kind)

    rows = (batch, kv_heads * groups)
    pool = (kv_heads, batch * keys // size + 1)
    levels = dim if bits is None else round(dim * bits)
    query = Query(
        q=array(*rows, dim, kind=dtype),
        integers=array(*rows, levels, kind=jnp.int8),
        step=array(*rows),
        of_spread=array(*rows),
        of_scale=array(*rows),
    )
    half = array(*pool, size, kind=jnp.float16)
    unit = array(*pool, kind=jnp.float16)
    codes: Codes | Signs
    if bits is None:
        of_key = array(*pool, size, dim // 2, kind=jnp.uint8)
        codes = Codes(of_key, half, half, array(*pool, dim, kind=jnp.int8), unit)
    else:
        of_key = array(*pool, levels // 32, size, kind=jnp.uint32)
        codes = Signs(of_key, half, half, array(*pool, dim // 2, kind=jnp.uint8), unit)
    table = array(batch, keys // size, kind=jnp.int32)
    of_sequence = array(batch, kind=jnp.int32)
    return CompileCase(
        name=f"sketch_select {label}: B {batch} K {kv_heads} G {groups} D {dim} Z {size} "
        f"{'' if bits is None else f'{bits} learnt bits '}{jnp.dtype(dtype).name}, {keys:,} keys",
        call=functools.partial(_call, scale=dim**-0.5 if lse else None),
        arguments=(query, codes, table, of_sequence, of_sequence, array(*rows)),
        kernels=("sketch_select",),
        claims=frozenset({"wgmma", "tma", "fences"}),
        work=work(batch, kv_heads, groups, dim, size, keys, bits),
    )


def _call(
    query: Query, keys: Codes | Signs, pages: jax.Array, low: jax.Array, high: jax.Array,
    beta: jax.Array, *, scale: float | None,
) -> Selected:  # fmt: skip
    return sketch_select(
        query, keys, pages, low, high, beta=beta, scale=scale, implementation="mosaic_gpu"
    )


def with_decode(keys: int, share: float) -> CompileCase:
    """A scan of one bit a channel, and `paged_decode` of the pages found, a share of all."""
    scan = case("", keys, bits=1)
    query, _, table, *_ = scan.arguments
    read = paged_decode.case("", keys, share=share)
    batch, heads, dim = query.q.shape
    kv_heads, _, size, _ = read.arguments[1].shape
    listed = read.arguments[3].shape[-1]
    group = heads // kv_heads
    return CompileCase(
        name=f"sketch_select and paged_decode: B {batch} K {kv_heads} G {group} D {dim} Z {size} 1 "
        f"learnt bits bfloat16, {listed * size:,} of {size * table.shape[1]:,} keys",
        call=functools.partial(_call_with_decode, capacity=listed),
        arguments=(*scan.arguments, *read.arguments[1:3]),
        kernels=("sketch_select", "paged_decode"),
        claims=scan.claims,
        work=Work(scan.work.bytes + read.work.bytes, scan.work.flops + read.work.flops),
    )


def _call_with_decode(
    query: Query, keys: Codes | Signs, pages: jax.Array, low: jax.Array, high: jax.Array,
    beta: jax.Array, k: jax.Array, v: jax.Array, *, capacity: int,
) -> PagedDecode:  # fmt: skip
    found = sketch_select(
        query, keys, pages, low, high, beta=beta, capacity=capacity, implementation="mosaic_gpu"
    )
    lists = found.page_ids, jnp.minimum(found.count, capacity), high
    return decode(
        query.q,
        k,
        v,
        *lists,
        starts=found.starts,
        threshold=found.best - beta,
        implementation="mosaic_gpu",
    )


def work(
    batch: int,
    kv_heads: int,
    groups: int,
    dim: int,
    size: int,
    keys: int,
    bits: float | None = None,
) -> Work:
    """The sketch once; the bounds, 4 G bytes per page, are small beside it and not counted."""
    levels = dim if bits is None else dim * bits
    codes, centre = (dim / 2, dim) if bits is None else (dim * bits / 8, dim / 2)
    page = size * (codes + 4) + centre + 2
    return Work(
        bytes=batch * kv_heads * (keys / size) * page,
        flops=2.0 * batch * kv_heads * groups * keys * levels,
    )


def cases() -> list[CompileCase]:
    """The cases to compile."""
    return [
        case("scan", 8192),
        case("scan", 131072),
        case("scan", 131072, batch=4),
        case("scan", 1048576),
        case("with log-sum-exp", 131072, lse=True),
        case("long pages", 131072, size=64, dtype=jnp.float16),
        case("Llama 3.2 1B", 131072, dim=64, size=32, lse=True),
        case("scan", 8192, bits=1),
        case("scan", 131072, bits=1),
        case("scan", 131072, batch=4, bits=1),
        case("scan", 1048576, bits=1),
        case("scan", 131072, bits=0.5),
        case("scan", 131072, bits=1.5),
        case("with log-sum-exp", 131072, bits=2, lse=True),
        case("D 96", 131072, groups=1, kv_heads=32, dim=96, bits=1),
        case("long pages", 131072, size=128, bits=1),
        case("Llama 3.2 1B", 131072, dim=64, size=32, bits=1, lse=True),
        case("few words", 131072, dim=64, size=64, bits=0.5),
        with_decode(131072, 0.05),
        with_decode(1048576, 0.015),
    ]
