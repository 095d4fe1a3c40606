"""`block_sparse_prefill` on a device: random chunks against the reference, and rows of timings."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu import timing
from gpu.against_reference import AgainstReference

from alaya_jax.pallas_kernels import dispatch
from alaya_jax.pallas_kernels.block_sparse_prefill import (
    QUERY_BLOCK,
    block_sparse_prefill,
    compile_cases,
    mosaic_gpu,
)
from alaya_jax.pallas_kernels.block_sparse_prefill.layout import Lists
from alaya_jax.pallas_kernels.dispatch import Target

OP = "block_sparse_prefill"
BLOCK_KV = 128


@dataclasses.dataclass(frozen=True)
class Shape:
    """One row: a chunk behind `cached` tokens; `listed` blocks of keys a list, 0 for dense."""

    tokens: int
    cached: int = 0
    listed: int = 0
    beta: float | None = None
    kv_heads: int = 8
    groups: int = 4
    dim: int = 128
    size: int = 16

    def describe(self) -> dict:
        return {"op": OP, **dataclasses.asdict(self)}


ROWS = (
    Shape(16384),
    Shape(4096, cached=126976, listed=51),
    Shape(4096, cached=126976, listed=256),
    Shape(4096, cached=126976),
    Shape(4096, cached=28672, beta=40.0),
    Shape(4096, cached=28672),
)
QUICK = (Shape(128, cached=128, kv_heads=1, groups=2, dim=64),)
CHECKED = (
    Shape(1000, cached=700, kv_heads=2),
    Shape(1000, cached=700, kv_heads=2, listed=3, dim=64),
    Shape(300, cached=2000, kv_heads=1, beta=3.0, size=64),
)


def _inputs(shape: Shape, seed: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    total = shape.cached + shape.tokens
    pages = -(-total // shape.size)
    pool = (shape.kv_heads, pages + 1, shape.size, shape.dim)
    heads = shape.kv_heads * shape.groups
    kq, kk, kv = jax.random.split(jax.random.key(seed), 3)
    make = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    options: dict[str, Any] = {}
    if shape.listed:
        blocks = -(-shape.tokens // QUERY_BLOCK)
        lists = np.empty((1, shape.kv_heads, blocks, shape.listed), np.int32)
        for head, block in np.ndindex(shape.kv_heads, blocks):
            last = (shape.cached + (block + 1) * QUERY_BLOCK - 1) // BLOCK_KV
            some = rng.permutation(last)[: shape.listed - 1]
            lists[0, head, block] = np.sort([*some, last])[::-1]
        options["blocks"] = jnp.asarray(lists)
        options["block_counts"] = jnp.full(lists.shape[:3], shape.listed, jnp.int32)
    if shape.beta is not None:
        options["beta"] = jnp.full(heads, shape.beta, jnp.float32)
    return (
        make(kq, (1, shape.tokens, heads, shape.dim)),
        make(kk, pool),
        make(kv, pool),
        jnp.asarray(1 + rng.permutation(pages)[None], jnp.int32),
        jnp.full(1, shape.cached, jnp.int32),
        jnp.full(1, shape.tokens, jnp.int32),
        options,
    )


def _call(implementation: str, target: Target | None, *arguments: Any) -> Any:
    *arrays, options = arguments
    got = block_sparse_prefill(
        *arrays, **options, block_kv=BLOCK_KV, implementation=implementation, target=target
    )
    return got.out, got.lse


def rows(
    quick: bool, sweep: bool
) -> Iterator[tuple[dict, float, float, Callable[[], dict[str, Any]]]]:
    """(description, bytes, flops, function that makes {name: (call, inputs)}) of every row."""
    for shape in QUICK if quick else ROWS:
        listed = shape.listed * BLOCK_KV or None
        work = compile_cases.work(
            shape.tokens, shape.cached, shape.kv_heads, shape.groups, shape.dim, listed
        )
        yield (
            shape.describe(),
            work.bytes,
            work.flops,
            functools.partial(_calls, shape, quick, sweep),
        )


def _calls(shape: Shape, quick: bool, sweep: bool) -> dict[str, Any]:
    """Ours and XLA's; and cuDNN's over contiguous keys where the chunk is the whole sequence."""
    inputs = [_inputs(shape, seed) for seed in range(1 if quick else 2)]
    names = ("xla",) if quick else ("mosaic_gpu", "xla")  # simulating takes forever
    found = {name: (jax.jit(functools.partial(_call, name, None)), inputs) for name in names}
    for tuning in SWEEP if sweep and not quick else ():
        place = "registers" if tuning.p_in_registers else "SMEM"
        name = f"mosaic_gpu {tuning.stages} stages, P in {place}"
        found[name] = (jax.jit(functools.partial(_tuned, tuning)), inputs)
    if not shape.cached and jax.default_backend() == "gpu":

        def contiguous(q: Any, k: Any, v: Any, *_: Any) -> Any:
            """What cuDNN takes: [B, S, K, D]."""

            def tokens(pool: Any) -> Any:
                rows = pool[:, 1:].reshape(1, shape.kv_heads, -1, shape.dim)
                return jnp.transpose(rows[:, :, : shape.tokens], (0, 2, 1, 3))

            return q, tokens(k), tokens(v)

        attend = functools.partial(
            jax.nn.dot_product_attention, implementation="cudnn", is_causal=True
        )
        found["cudnn"] = (jax.jit(attend), [contiguous(*row) for row in inputs])
    return found


SWEEP = tuple(
    mosaic_gpu.Tuning(stages=stages, p_in_registers=registers)
    for stages in (1, 2)
    for registers in (False, True)
)


def _tuned(tuning: Any, *arguments: Any) -> Any:
    q, k, v, pages, lengths, count, options = arguments
    blocks = options.get("blocks")
    lists = None
    if blocks is not None:
        lists = Lists(blocks, options["block_counts"], jnp.zeros_like(options["block_counts"]))
    got = mosaic_gpu.prefill(
        q, k, v, pages, lengths, count, lists=lists, beta=options.get("beta"), block_kv=BLOCK_KV,
        scale=q.shape[-1] ** -0.5, target=dispatch.current_target(), tuning=tuning,
    )  # fmt: skip
    return got.out, got.lse


TOLERANCE = 2e-2


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference of two results, of out and of lse."""

    def largest(a: Any, b: Any) -> float:
        return float(jnp.max(jnp.where(a == b, 0.0, jnp.abs(a - b))))  # -inf is equal to -inf

    return max(largest(a, b) for a, b in zip(ours, theirs, strict=True))


checks = AgainstReference(OP, CHECKED, QUICK, _inputs, _call, difference, TOLERANCE)


def torch_rows(shape: dict) -> dict[str, float]:
    """Microseconds of torch's SDPA where it does the same: a whole sequence, dense."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available() or shape["cached"] or shape["listed"]:
        return {}
    heads = shape["kv_heads"] * shape["groups"]
    q, k, v = (
        torch.randn((1, n, shape["tokens"], shape["dim"]), device="cuda", dtype=torch.bfloat16)
        for n in (heads, shape["kv_heads"], shape["kv_heads"])
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    return {
        "torch_sdpa_us": timing.torch_us(lambda: attend(q, k, v, is_causal=True, enable_gqa=True))
    }
