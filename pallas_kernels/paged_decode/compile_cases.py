"""The shapes at which `aot` compiles `paged_decode`: Llama 3's, and each feature once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from alaya_jax.pallas_kernels.compile_case import CompileCase, Work
from alaya_jax.pallas_kernels.paged_decode import PagedDecode, paged_decode


def case(
    label: str,
    keys: int,
    *,
    batch: int = 1,
    kv_heads: int = 8,
    groups: int = 4,
    dim: int = 128,
    size: int = 16,
    share: float = 1.0,
    features: tuple[str, ...] = (),
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> CompileCase:
    """A call over a context of `keys` tokens, a share of which is listed; 1.0: dense decoding."""
    i32, f32 = jnp.int32, jnp.float32

    def array(shape: tuple[int, ...], kind: jax.typing.DTypeLike = i32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind)

    lists = 1 if share == 1.0 else kv_heads
    listed = max(1, round(keys * share) // size)
    pool = array((kv_heads, batch * keys // size + 1, size, dim), dtype)
    heads = kv_heads * groups
    available = {
        "starts": array((batch, lists, listed)),
        "low": array((batch,)),
        "gap_low": array((batch,)),
        "gap_high": array((batch,)),
        "threshold": array((batch, heads), f32),
        "key_mask": array((batch, heads, listed, size), jnp.bool_),
    }
    options = {name: available[name] for name in features}
    width = jnp.dtype(dtype).itemsize
    if width == 1:
        scales = array(pool.shape[:3], f32)
        options |= {"k_scale": scales, "v_scale": scales}
    arguments = (
        array((batch, heads, dim), jnp.bfloat16 if width == 1 else dtype),
        pool,
        pool,
        array((batch, lists, listed)),
        array((batch, lists)),
        array((batch,)),
        options,
    )
    return CompileCase(
        name=f"paged_decode {label}: B {batch} K {kv_heads} G {groups} D {dim} Z {size} "
        f"{jnp.dtype(dtype).name}, {listed * size:,} of {keys:,} keys",
        call=functools.partial(_call, want_kept="threshold" in features),
        arguments=arguments,
        kernels=("paged_decode",),
        claims=frozenset({"wgmma", "tma", "fences"}),
        work=work(batch, kv_heads, groups, dim, listed * size, width),
    )


def _call(*arguments: Any, want_kept: bool) -> PagedDecode:
    *arrays, options = arguments
    return paged_decode(*arrays, **options, want_kept=want_kept, implementation="mosaic_gpu")


def work(batch: int, kv_heads: int, groups: int, dim: int, keys: int, width: int) -> Work:
    """Keys and values once, and two matmuls. Queries, lists and results are a thousandth of it."""
    scales = 4 if width == 1 else 0
    return Work(
        bytes=2.0 * batch * kv_heads * keys * (dim * width + scales),
        flops=4.0 * batch * kv_heads * groups * keys * dim,
    )


_ALL = ("starts", "low", "gap_low", "gap_high", "threshold")


def cases() -> tuple[CompileCase, ...]:
    """The cases to compile."""
    return (
        case("dense", 8192),
        case("dense", 8192, batch=4),
        case("dense", 131072),
        case("dense", 131072, batch=4),
        case("dense", 131072, size=64),
        case("sparse", 131072, share=0.05, features=("starts", "threshold")),
        case("sparse", 131072, share=0.05, features=_ALL, batch=4),
        case("sparse", 1048576, share=0.05, features=("starts", "threshold")),
        case("sparse", 131072, share=0.05, features=_ALL, size=32),
        case("sparse", 131072, share=0.05, features=_ALL, size=64, dtype=jnp.float16),
        case("sparse, masked", 131072, share=0.05, features=("starts", "key_mask")),
        case("sparse, masked", 131072, share=0.05, features=(*_ALL, "key_mask"), size=64),
        case("Llama-3.2-1B", 131072, dim=64, features=_ALL),
        case("Llama-3-70B over 8", 131072, kv_heads=1, groups=8, features=_ALL),
        case("Llama-3-8B over 8", 131072, kv_heads=1, features=_ALL),
        case("head_dim 96", 32768, dim=96, features=_ALL),
        case("SmolLM2-135M", 8192, kv_heads=3, groups=3, dim=64, features=_ALL),
        case("8 bits", 131072, features=_ALL, dtype=jnp.int8),
        case("8 bits", 131072, share=0.05, size=64, features=_ALL, dtype=jnp.int8),
        case("8 bits", 131072, features=_ALL, dtype=jnp.float8_e4m3fn),
        case("8 bits", 32768, dim=64, features=_ALL, dtype=jnp.int8),
        case("8 bits", 32768, dim=96, features=_ALL, dtype=jnp.float8_e4m3fn),
        case("16 heads a group", 32768, kv_heads=2, groups=16, features=_ALL),
    )
