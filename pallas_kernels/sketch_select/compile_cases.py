"""The shapes at which `aot` compiles `sketch_select`: Llama 3's, and each feature once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from alaya_jax.pallas_kernels.compile_case import CompileCase, Work
from alaya_jax.pallas_kernels.sketch_select import Codes, Query, Selected, sketch_select


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
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> CompileCase:
    """A scan of `keys` keys of each sequence."""

    def array(*shape: int, kind: jax.typing.DTypeLike = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, kind)

    rows = (batch, kv_heads * groups)
    pool = (kv_heads, batch * keys // size + 1)
    query = Query(
        q=array(*rows, dim, kind=dtype),
        integers=array(*rows, dim, kind=jnp.int8),
        step=array(*rows),
        of_spread=array(*rows),
        of_scale=array(*rows),
    )
    codes = Codes(
        codes=array(*pool, size, dim // 2, kind=jnp.uint8),
        scale=array(*pool, size, kind=jnp.float16),
        spread=array(*pool, size, kind=jnp.float16),
        centre=array(*pool, dim, kind=jnp.int8),
        unit=array(*pool, kind=jnp.float16),
    )
    table = array(batch, keys // size, kind=jnp.int32)
    of_sequence = array(batch, kind=jnp.int32)
    return CompileCase(
        name=f"sketch_select {label}: B {batch} K {kv_heads} G {groups} D {dim} Z {size} "
        f"{jnp.dtype(dtype).name}, {keys:,} keys",
        call=functools.partial(_call, scale=dim**-0.5 if lse else None),
        arguments=(query, codes, table, of_sequence, of_sequence, array(*rows)),
        kernels=("sketch_select",),
        claims=frozenset({"wgmma", "tma", "fences"}),
        work=work(batch, kv_heads, groups, dim, size, keys),
    )


def _call(
    query: Query, keys: Codes, pages: jax.Array, low: jax.Array, high: jax.Array,
    beta: jax.Array, *, scale: float | None,
) -> Selected:  # fmt: skip
    return sketch_select(
        query, keys, pages, low, high, beta=beta, scale=scale, implementation="mosaic_gpu"
    )


def work(batch: int, kv_heads: int, groups: int, dim: int, size: int, keys: int) -> Work:
    """The sketch once; the bounds, 4 G bytes per page, are small beside it and not counted."""
    page = size * (dim / 2 + 4) + dim + 2
    return Work(
        bytes=batch * kv_heads * (keys / size) * page,
        flops=2.0 * batch * kv_heads * groups * keys * dim,
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
    ]
