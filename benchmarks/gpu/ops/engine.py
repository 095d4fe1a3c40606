"""`engine.attend` on a device: every plan against the same without kernels, and a decode step's
attention of one layer with its selection, beside cuDNN over all keys.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu import from_tests

from alaya_jax import configs
from alaya_jax.attention import engine, kernels
from alaya_jax.cache import PageTable
from alaya_jax.index import Sketch
from alaya_jax.index.memory import LayerMemory
from alaya_jax.models import LlamaConfig
from alaya_jax.pallas_kernels.dispatch import Target, current_target
from alaya_jax.query import DIPR, Full, TopK
from alaya_jax.query.plan import Plan

OP = "engine"


def checks(target: Target | None, quick: bool) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """(name, function that gives what is wrong, or None) of every plan."""
    tests = from_tests.module("attention/test_kernels.py")
    decode = list(tests.DECODE)[:1] if quick else tests.DECODE
    for name in decode:
        yield f"{OP} decode {name}", functools.partial(_wrong, tests, tests.DECODE[name], 1, target)
    for name in () if quick else tests.PREFILL:
        yield (
            f"{OP} prefill {name}",
            functools.partial(_wrong, tests, tests.PREFILL[name], 150, target),
        )


def _wrong(tests: Any, plan: Plan, tokens: int, target: Target | None) -> str | None:
    lengths, count = [331, 75, 0, 200], [1, 1, 1, 0]
    if tokens > 1:
        lengths, count = [200, 0], [tokens, 77]
    case = tests.make(np.random.default_rng(5), lengths, count, tokens, jnp.bfloat16)
    if plan.by == "page" and isinstance(plan.index, Sketch):
        case = dataclasses.replace(case, covered=case.table.length // tests.Z * tests.Z)
    index = case.indexes.get(plan.index)
    memory = LayerMemory(case.k, case.v, case.table, index, case.covered)
    batch = kernels.LayerQueries(case.q, memory, case.count)
    target = target or current_target()
    if (why := kernels.unfit(plan, batch, "mosaic_gpu", target)) is not None:
        return f"no kernel answers it: {why}"
    run = jax.jit(functools.partial(kernels.attend, implementation="mosaic_gpu", target=target))
    got = jax.block_until_ready(run(plan, batch))
    plain = dataclasses.replace(plan, implementation="xla")
    with jax.default_matmul_precision("highest"):
        want = engine.attend(plain, case.q, memory, case.count)
    new = np.arange(tokens)[None, :, None] < np.asarray(case.count)[:, None, None]
    try:
        tests.check(got, want, new, 3e-2)
    except AssertionError as e:
        return " ".join(str(e).split())[:400]
    return None


@dataclasses.dataclass(frozen=True)
class Shape:
    """One row: a new token of each sequence behind `keys` keys of random direction."""

    keys: int
    plan: str
    batch: int = 1
    kv_heads: int = 8
    groups: int = 4
    dim: int = 128
    size: int = 16

    def describe(self) -> dict:
        return {"op": OP, **dataclasses.asdict(self)}


PLANS = {
    "Full": Plan(Full()),
    "DIPR(38) @ Sketch": Plan(DIPR(beta=38.0), Sketch()),
    "DIPR(38) @ Sketch by page": Plan(DIPR(beta=38.0), Sketch(), "page", "group"),
    "recovery 0.9 @ Sketch by page": Plan(DIPR(recovery=0.9), Sketch(), "page", "group"),
    "recovery 0.9 @ Sketch": Plan(DIPR(recovery=0.9), Sketch()),
    "TopK(100) @ Sketch": Plan(TopK(100), Sketch()),
}
ROWS = (
    Shape(131072, "Full"),
    Shape(131072, "DIPR(38) @ Sketch"),
    Shape(131072, "DIPR(38) @ Sketch by page"),
    Shape(131072, "recovery 0.9 @ Sketch by page"),
    Shape(131072, "recovery 0.9 @ Sketch"),
    Shape(131072, "TopK(100) @ Sketch"),
    Shape(1048576, "DIPR(38) @ Sketch"),
    Shape(131072, "DIPR(38) @ Sketch", batch=4),
)
QUICK = (Shape(1024, "DIPR(38) @ Sketch", kv_heads=1, groups=2, dim=64),)


def rows(
    quick: bool, sweep: bool
) -> Iterator[tuple[dict, float, float, Callable[[], dict[str, Any]]]]:
    """(description, bytes of K and V, flops of full attention, function that makes the calls)."""
    for shape in () if sweep else QUICK if quick else ROWS:
        moved = 4.0 * shape.batch * shape.kv_heads * shape.keys * shape.dim
        flops = moved * shape.groups
        yield shape.describe(), moved, flops, functools.partial(_calls, shape, quick)


def _calls(shape: Shape, quick: bool) -> dict[str, Any]:
    fields = configs.load("llama-3-8b")
    config = LlamaConfig.from_hf(
        {
            **fields,
            "num_attention_heads": shape.kv_heads * shape.groups,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.dim,
        }
    )
    plan = PLANS[shape.plan]
    each = shape.keys // shape.size
    pages = shape.batch * each + 1
    pool = (shape.kv_heads, pages, shape.size, shape.dim)
    table = jnp.arange(1, pages, dtype=jnp.int32).reshape(shape.batch, each)
    length = jnp.full(shape.batch, shape.keys - 1, jnp.int32)
    covered = length // shape.size * shape.size

    @jax.jit
    def make(key: Any) -> Any:
        normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
        kq, kk, kv = jax.random.split(key, 3)
        q = 3 * normal(kq, (shape.batch, 1, shape.kv_heads * shape.groups, shape.dim))
        return q, normal(kk, pool), normal(kv, pool)

    q, k, v = make(jax.random.key(0))
    index = None
    if plan.index is not None:
        empty = plan.index.create(config, pages, shape.size, jnp.bfloat16)
        filled = jnp.full(pages - 1, shape.size, jnp.int32)
        ids = jnp.arange(1, pages, dtype=jnp.int32)
        index = jax.jit(lambda layer, k, v: layer.build(k, v, ids, filled))(empty, k, v)
    count = jnp.ones(shape.batch, jnp.int32)
    arrays = (q, LayerMemory(k, v, PageTable(table, length), index, covered), count)

    def call(implementation: str | None, *arrays: Any) -> Any:
        asked = dataclasses.replace(plan, implementation=implementation)
        return engine.attend(asked, *arrays)

    found = {"xla": (jax.jit(functools.partial(call, "xla")), [arrays])}
    if not quick:
        found["mosaic_gpu"] = (jax.jit(functools.partial(call, "mosaic_gpu")), [arrays])
    if isinstance(plan.query, Full) and jax.default_backend() == "gpu":

        @jax.jit
        def contiguous(q: Any, k: Any, v: Any) -> Any:
            """What cuDNN takes: [B, S, K, D]."""

            def tokens(x: Any) -> Any:
                x = x[:, 1:].reshape(shape.kv_heads, shape.batch, -1, shape.dim)
                return jnp.transpose(x, (1, 2, 0, 3))

            return q, tokens(k), tokens(v)

        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        found["cudnn"] = (jax.jit(attend), [contiguous(q, k, v)])
    return found


TOLERANCE = 2e-2


def facts(result: Any) -> dict[str, float]:
    """What was attended to and read, as a share of the keys."""
    if not isinstance(result, tuple):
        return {}
    counts = result[1]
    scored = np.asarray(counts.scored, np.float64).mean()
    return {
        "attended_share": round(float(np.asarray(counts.attended).mean() / scored), 5),
        "read_share": round(float(np.asarray(counts.read).mean() / scored), 5),
    }


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference of two outputs."""
    a, b = (x[0].astype(jnp.float32) for x in (ours, theirs))
    return float(jnp.max(jnp.abs(a - b)))


def torch_rows(shape: dict) -> dict[str, float]:
    """The rows of `paged_decode` hold torch's times."""
    del shape
    return {}
