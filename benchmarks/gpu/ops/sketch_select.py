"""`sketch_select` on a device: random sketches against the reference, and rows of timings."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu.against_reference import AgainstReference

from alaya_jax.pallas_kernels import dispatch
from alaya_jax.pallas_kernels.dispatch import Target
from alaya_jax.pallas_kernels.sketch_select import (
    Codes,
    Query,
    Signs,
    compile_cases,
    mosaic_gpu,
    select,
    sketch_select,
)

OP = "sketch_select"


@dataclasses.dataclass(frozen=True)
class Shape:
    """One row; `scattered`: the pages are no neighbours in the pool."""

    keys: int
    batch: int = 1
    scattered: bool = False
    kv_heads: int = 8
    groups: int = 4
    dim: int = 128
    size: int = 16
    low: int = 0
    bits: float | None = None  # of a learnt basis; None: fields of 4 bits

    def describe(self) -> dict:
        return {"op": OP, **dataclasses.asdict(self)}


ROWS = (
    Shape(131072),
    Shape(131072, batch=4),
    Shape(1048576),
    Shape(131072, scattered=True),
    Shape(8192),
    *(Shape(131072, bits=bits) for bits in (0.5, 1, 1.5, 2)),
    Shape(131072, batch=4, bits=1),
    Shape(131072, bits=1, scattered=True),
    Shape(1048576, bits=1),
    Shape(8192, bits=1),
)
QUICK = (Shape(1024, kv_heads=1, dim=64), Shape(1024, kv_heads=1, bits=1))
CHECKED = (
    Shape(5000, batch=2, dim=64, low=700),
    Shape(5000, batch=2),
    Shape(5000, scattered=True),
    Shape(8000, size=64, scattered=True, low=1),
    *(Shape(5000, batch=2, bits=bits, low=700) for bits in (0.5, 1, 1.5, 2, 4)),
    Shape(5000, scattered=True, bits=1),
    Shape(5000, scattered=True, dim=96, groups=8, bits=1),  # a page is less than TMA can place
    Shape(5000, dim=96, bits=2, size=32),
    Shape(8000, dim=64, bits=0.5, size=64, scattered=True, low=1),
    Shape(8000, dim=64, bits=1.5, size=128, low=1),
)


def _inputs(shape: Shape, seed: int) -> tuple[Any, ...]:
    table = -(-shape.keys // shape.size)
    pool = max(shape.batch * table, 512 // shape.size)
    rng = np.random.default_rng(seed)
    ids = rng.permutation(pool) if shape.scattered else np.arange(pool)

    @jax.jit
    def make(key: Any) -> tuple[Query, Codes | Signs]:
        bits, numbers = jax.random.bits, functools.partial(jax.random.uniform, maxval=0.1)
        k = jax.random.split(key, 8)
        keys = (shape.kv_heads, pool, shape.size)
        rows = (shape.batch, shape.kv_heads * shape.groups)
        scale, spread = (numbers(x, keys).astype(jnp.float16) for x in k[1:3])
        unit = numbers(k[4], keys[:2]).astype(jnp.float16) / 10
        levels, dim = shape.dim, shape.dim
        if shape.bits is None:
            of_key = bits(k[0], (*keys, dim // 2), jnp.uint8)
            centre = jax.random.randint(k[3], (*keys[:2], dim), -127, 128, jnp.int8)
            codes = Codes(of_key, scale, spread, centre, unit)
        else:
            levels = round(dim * shape.bits)
            of_key = bits(k[0], (*keys[:2], levels // 32, shape.size), jnp.uint32)
            centre = bits(k[3], (*keys[:2], dim // 2), jnp.uint8)
            codes = Signs(of_key, scale, spread, centre, unit)
        q = jax.random.normal(k[5], (*rows, shape.dim), jnp.bfloat16)
        integers = jax.random.randint(k[6], (*rows, levels), -127, 128, jnp.int8)
        some = numbers(k[7], rows)
        return Query(q, integers, some / 10, 10 * some, some), codes

    pages = jnp.asarray(ids[: shape.batch * table].reshape(shape.batch, table), jnp.int32)
    low, high = (jnp.full(shape.batch, x, jnp.int32) for x in (shape.low, shape.keys))
    return *make(jax.random.key(seed)), pages, low, high


def _call(implementation: str, target: Target | None, *arrays: Any) -> Any:
    return sketch_select(*arrays, beta=4.0, implementation=implementation, target=target)


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
            shape.size,
            shape.keys,
            shape.bits,
        )
        yield (
            shape.describe(),
            work.bytes,
            work.flops,
            functools.partial(_calls, shape, quick, sweep),
        )


def _calls(shape: Shape, quick: bool, sweep: bool) -> dict[str, Any]:
    """Ours and XLA's; a sketch is larger than the L2 or is read from several."""
    inputs = [_inputs(shape, seed) for seed in range(1 if quick else 3)]
    names = ("xla",) if quick else ("mosaic_gpu", "xla")  # simulating takes forever
    found = {name: (jax.jit(functools.partial(_call, name, None)), inputs) for name in names}
    for tuning in SWEEP if sweep and not quick else ():
        name = f"mosaic_gpu {tuning.stages} stages {tuning.blocks} blocks"
        found[name] = (jax.jit(functools.partial(_tuned, tuning)), inputs)
    return found


SWEEP = tuple(
    mosaic_gpu.Tuning(stages=stages, blocks=blocks) for stages in (2, 3) for blocks in (132, 264)
)


def _tuned(tuning: Any, query: Query, keys: Codes | Signs, pages: Any, low: Any, high: Any) -> Any:
    found = mosaic_gpu.bounds(
        query, keys, pages, low, high, scale=None, target=dispatch.current_target(), tuning=tuning
    )
    beta = jnp.full_like(query.step, 4.0)
    return select(found, pages, low, high, beta, None, keys.scale.shape[2], pages.shape[1])


TOLERANCE = 1e-3


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference of best scores; inf if other pages were kept."""
    if not bool(jnp.all(ours.count == theirs.count)):
        return float("inf")
    listed = jnp.arange(ours.page_ids.shape[2]) < ours.count[..., None]
    if not bool(jnp.all((ours.page_ids == theirs.page_ids) | ~listed)):
        return float("inf")
    return float(jnp.max(jnp.abs(ours.best - theirs.best)))


checks = AgainstReference(OP, CHECKED, QUICK, _inputs, _call, difference, TOLERANCE)


def torch_rows(shape: dict) -> dict[str, float]:
    """Torch has no such operation."""
    del shape
    return {}
