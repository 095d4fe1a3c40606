"""One layer's attention of a decode step on the CPU: this library's plans and torch's in one run.

    python benchmarks/decode_attention.py [--lengths 1024,4096,16384,65536,131072] [--graph]

Keys with planted critical sets (planted.py), of Llama-3-8B's shape (K 8, G 4, D 128), float32. The
sides take turns; the peer is a process of its own with the variants an expert would try, and the
fastest of them counts. Medians; ratio = peer's seconds / ours. Each query is another one. Beside
the time stands what the answer is worth: the true share of the attention mass that was attended to,
its mean and its least over queries and heads, and the relative error of the output.

"crossover" is the length at which a plan begins to be faster than this library's own `Full`, from
the lengths measured, linear between them on a logarithmic scale.

Keep the machine quiet. JSON lines on stdout and in benchmarks/results/decode_attention.jsonl. Exit
code 3: no peer here.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from planted import Planted

from alaya_jax import configs
from alaya_jax.attention import engine
from alaya_jax.cache import PageTable
from alaya_jax.index import Flat, Sketch
from alaya_jax.models import LlamaConfig
from alaya_jax.query import DIPR, Full, TopK, Window
from alaya_jax.query.plan import Plan

RESULTS = Path(__file__).resolve().parent / "results" / "decode_attention.jsonl"
HEADS, GROUP, DIM, PAGE = 8, 4, 128, 16
WINDOW = Window(128, 512)


def plans(beta: float) -> dict[str, Plan]:
    """By name; beta is that of alpha = 0.0144."""
    return {
        "full": Plan(Full()),
        "dipr_flat": Plan(DIPR(beta, WINDOW), Flat()),
        "dipr_sketch": Plan(DIPR(beta, WINDOW), Sketch()),
        "recovery_sketch": Plan(DIPR(recovery=0.99, window=WINDOW), Sketch()),
        "recovery_sketch_tail": Plan(DIPR(recovery=0.95, window=WINDOW), Sketch(), tail=True),
        "top100_sketch": Plan(TopK(100, WINDOW), Sketch()),
    }


class Layer:
    """A layer's pages, its sketch, and queries [turns, 1, 1, H, D] of the last token."""

    def __init__(self, planted: Planted, turns: int):
        n = planted.n
        self.planted, self.count = planted, -(-n // PAGE)

        def paged(x: np.ndarray) -> jax.Array:
            x = np.pad(x, ((0, 0), (PAGE, -n % PAGE), (0, 0)))
            return jnp.asarray(x.reshape(HEADS, self.count + 1, PAGE, DIM))

        self.k, self.v = paged(planted.keys()), paged(planted.values())
        ids = jnp.arange(1, self.count + 1)
        config = LlamaConfig.from_hf(configs.load("llama-3-8b"))
        empty = Sketch().create(config, self.count + 1, PAGE)
        build = jax.jit(lambda layer, *args: layer.build(*args))
        filled = jnp.full(self.count, PAGE)
        self.sketch = jax.block_until_ready(build(empty, self.k, self.v, ids, filled))
        self.table = PageTable(ids[None].astype(jnp.int32), jnp.full(1, n - 1, jnp.int32))
        self.covered = jnp.full(1, (n - 1) // PAGE * PAGE, jnp.int32)
        queries = np.concatenate([planted.queries(1, i)[0] for i in range(turns)], axis=2)
        # [K, G, turns, D] -> one token of all heads each
        self.queries = jnp.asarray(
            np.moveaxis(queries, 2, 0).reshape(turns, 1, 1, HEADS * GROUP, DIM)
        )

    def attend(self, plan: Plan, turn: int):
        """Output and counts of one step."""
        index = self.sketch if isinstance(plan.index, Sketch) else None
        one = jnp.ones(1, jnp.int32)
        return engine.attend(
            plan, self.queries[turn], self.k, self.v, self.table, one, index, self.covered
        )
