"""`paged_decode` on a device: its table of cases, and rows of timings beside the alternatives."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu import from_tests, timing

from alaya_jax.pallas_kernels import dispatch
from alaya_jax.pallas_kernels.dispatch import Target
from alaya_jax.pallas_kernels.paged_decode import compile_cases, keys, mosaic_gpu, paged_decode

OP = "paged_decode"


def checks(target: Target | None, quick: bool) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """(name, function that gives what is wrong, or None) of every case; the truth is numpy's."""
    table = from_tests.module("pallas_kernels/paged_decode_cases.py")
    run = jax.jit(
        functools.partial(paged_decode, want_kept=True, implementation="mosaic_gpu", target=target)
    )
    plans = [(table.Sizes(), kind) for kind in table.KINDS]
    plans += [(sizes, "plain") for sizes in table.VARIANTS.values()]
    for number, (sizes, kind) in enumerate(plans[:3] if quick else plans):
        name = f"{OP} {kind}, D {sizes.dim} Z {sizes.size} G {sizes.groups} {sizes.dtype}"
        rng = np.random.default_rng(number)
        yield name, functools.partial(_wrong, table, run, sizes, kind, rng)


def _wrong(table: Any, run: Any, sizes: Any, kind: str, rng: np.random.Generator) -> str | None:
    arrays = table.make(sizes, kind, rng)
    typed = {name: jnp.asarray(x, table.dtype_of(name, sizes)) for name, x in arrays.items()}
    floats = ("q", "k_pages", "v_pages")
    seen = {n: np.asarray(x, np.float32) if n in floats else arrays[n] for n, x in typed.items()}
    with np.errstate(invalid="ignore"):
        out, lse, best, kept = table.truth(seen, sizes.lists)
    got = run(**typed)
    try:
        np.testing.assert_allclose(got.out, out, atol=1e-2, rtol=1e-5)
        np.testing.assert_allclose(got.lse, lse, atol=1e-4, rtol=1e-5)
        np.testing.assert_allclose(got.best, best, atol=1e-3, rtol=1e-5)
        np.testing.assert_array_equal(got.kept, kept)
    except AssertionError as e:
        return " ".join(str(e).split())[:300]
    return None


@dataclasses.dataclass(frozen=True)
class Shape:
    """One row: `share` of `keys` is listed."""

    keys: int
    batch: int = 1
    share: float = 1.0
    kv_heads: int = 8
    groups: int = 4
    dim: int = 128
    size: int = 16
    bits: int = 16

    @property
    def listed(self) -> int:
        return max(1, round(self.keys * self.share) // self.size)

    def describe(self) -> dict:
        return {"op": OP, **dataclasses.asdict(self)}


ROWS = (
    Shape(8192),
    Shape(8192, batch=4),
    Shape(131072),
    Shape(131072, batch=4),
    Shape(131072, share=0.05),
    Shape(131072, batch=4, share=0.05),
    Shape(1048576, share=0.05),
    Shape(1048576),
    Shape(32768, batch=16),
    Shape(131072, size=64),
    Shape(131072, share=0.05, size=64),
    Shape(131072, bits=8),
)
"""Most wanted first: what the time does not reach is named and left out."""

QUICK = (
    Shape(256, kv_heads=2, dim=64),
    Shape(256, kv_heads=2, dim=64, share=0.25),
    Shape(256, kv_heads=2, dim=64, bits=8),
)


def rows(
    quick: bool, sweep: bool
) -> Iterator[tuple[dict, float, float, Callable[[], dict[str, Any]]]]:
    """(description, bytes, flops, function that makes {name: (call, inputs)}) of every row."""
    for shape in QUICK if quick else ROWS:
        work = compile_cases.work(
            shape.batch,
            shape.kv_heads,
            shape.groups,
            shape.dim,
            shape.listed * shape.size,
            shape.bits // 8,
        )
        yield (
            shape.describe(),
            work.bytes,
            work.flops,
            functools.partial(_calls, shape, quick, sweep),
        )


def _calls(shape: Shape, quick: bool, sweep: bool) -> dict[str, Any]:
    """Ours, XLA's and, for dense rows, cuDNN's over contiguous keys; inputs rotate past the L2."""
    heads = shape.kv_heads * shape.groups
    dense = shape.share == 1.0
    pages = shape.batch * shape.keys // shape.size
    pool = (shape.kv_heads, pages + 1, shape.size, shape.dim)
    touched = 4 * shape.batch * shape.listed * shape.size * shape.kv_heads * shape.dim
    copies = 1 if quick else max(2, min(8, math.ceil(200e6 / touched)))
    if 4 * math.prod(pool) * copies > 40e9:
        copies = 1  # such a pool is larger than any cache
    lists = 1 if dense else shape.kv_heads
    rng = np.random.default_rng(0)

    @jax.jit
    def fresh(key: Any) -> tuple[tuple[Any, Any, Any], tuple[Any, Any]]:
        """Queries and pools; scales of both pools, where they have 8 bits."""
        kq, kk, kv = jax.random.split(key, 3)
        normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
        q = normal(kq, (shape.batch, heads, shape.dim))
        if shape.bits == 16:
            return (q, normal(kk, pool), normal(kv, pool)), (None, None)
        k, v = (jax.random.randint(key, pool, -127, 128, jnp.int8) for key in (kk, kv))
        scales = jax.random.uniform(kq, pool[:3], minval=0.005, maxval=0.015)
        return (q, k, v), (scales, scales + 0.001)

    own = 1 + rng.permutation(pages).reshape(shape.batch, -1)  # as a pool in use: no run of pages
    inputs = []
    for copy in range(copies):
        order = np.empty((shape.batch, lists, shape.listed), np.int32)
        for row in np.ndindex(order.shape[:2]):
            order[row] = np.sort(rng.permutation(own.shape[1])[: shape.listed])
        ids = np.take_along_axis(own[:, None], order, axis=2)
        count = np.full(order.shape[:2], shape.listed, np.int32)
        arrays, scales = fresh(jax.random.key(copy))
        inputs.append(
            (
                *arrays,
                jnp.asarray(ids, jnp.int32),
                jnp.asarray(count),
                jnp.full(shape.batch, shape.keys, jnp.int32),
                jnp.asarray(order * shape.size),
                scales,
            )
        )

    def call(implementation: str, *arrays: Any) -> Any:
        *lists, starts, (k_scale, v_scale) = arrays
        return paged_decode(
            *lists,
            starts=None if dense else starts,
            k_scale=k_scale,
            v_scale=v_scale,
            implementation=implementation,
        )[:2]

    implementations = ("xla",) if quick else ("mosaic_gpu", "xla")  # simulating takes forever
    found = {name: (jax.jit(functools.partial(call, name)), inputs) for name in implementations}
    for tuning in SWEEP if sweep and not quick else ():
        name = f"mosaic_gpu {tuning.stages} stages {tuning.blocks} blocks"
        found[name] = (jax.jit(functools.partial(_tuned, shape, tuning)), inputs)
    if dense and shape.bits == 16 and jax.default_backend() == "gpu":

        @jax.jit
        def contiguous(q: Any, k: Any, v: Any, *_: Any) -> Any:
            """What cuDNN takes: [B, S, K, D]."""

            def tokens(pages: Any) -> Any:
                rows = pages[:, 1:].reshape(shape.kv_heads, shape.batch, -1, shape.dim)
                return jnp.transpose(rows, (1, 2, 0, 3))

            return q[:, None], tokens(k), tokens(v)

        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        found["cudnn"] = (jax.jit(attend), [contiguous(*row) for row in inputs[:2]])
    return found


SWEEP = tuple(
    mosaic_gpu.Tuning(stages=stages, blocks=blocks)
    for stages in (2, 3, 4, 6)
    for blocks in (132, 264, 528)
)


def _tuned(shape: Shape, tuning: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    ids, count, length, starts, scales = rest
    starts = None if shape.share == 1.0 else starts
    listed = keys.Keys(ids, count, starts, None, length, None, None, None)
    return mosaic_gpu.paged_decode(
        q, k, v, listed, *scales, scale=shape.dim**-0.5, want_kept=False,
        target=dispatch.current_target(), tuning=tuning,
    )[:2]  # fmt: skip


TOLERANCE = 2e-2


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference of two results, of out and of lse."""
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(ours, theirs, strict=True))


def torch_rows(shape: dict) -> dict[str, float]:
    """Microseconds of torch's SDPA on the same shape, where torch with CUDA is there."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available() or shape["share"] != 1.0 or shape["bits"] != 16:
        return {}
    size = (shape["batch"], shape["kv_heads"], shape["keys"], shape["dim"])
    heads = shape["kv_heads"] * shape["groups"]
    k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn((size[0], heads, 1, size[3]), device="cuda", dtype=torch.bfloat16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {"torch_sdpa_us": timing.torch_us(lambda: sdpa(q, k, v, enable_gqa=True))}
