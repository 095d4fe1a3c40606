"""One layer of random keys, and attention programs over them that are timed."""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alaya_jax.attention import engine
from alaya_jax.cache import PageTable
from alaya_jax.cache.tables import table_width
from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.index import Flat, Graph, GraphLayer, Sketch
from alaya_jax.index.graph.build import STARTS
from alaya_jax.index.memory import LayerMemory
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import DIPR, Full, Window
from alaya_jax.query.plan import Plan

SECONDS = 0.04
"""For which each program is called again and again, at least `CALLS` times."""

CALLS = 4
WIDTHS = 4
"""Times the narrowest table: keys that caches do not hold."""

_COPIES = 8  # of random keys, which are slow to draw


Timed = Callable[[float, int, float | None], tuple[float, Any]]
"""(scale of the query, keys, beta or None) -> seconds of an attention program, and its counts."""


@dataclasses.dataclass(frozen=True)
class LayerBench:
    """One layer's random keys, wider than caches, and a query.

    Attributes:
      config: the shape of the layer.
      k, v: [K, P + 1, Z, D]; one page belongs to nobody.
      q: float32 [1, 1, H, D], of standard normal channels.
      window: what the programs attend to in any case.
      building: held by the thread that makes the sketch.
    """

    config: LlamaConfig
    k: jax.Array
    v: jax.Array
    q: np.ndarray
    window: Window
    building: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @classmethod
    def create(cls, config: LlamaConfig, dtype: Any, page_size: int) -> "LayerBench":
        """Keys for four of the narrowest tables, dtype [K, P + 1, Z, D]."""
        pages = WIDTHS * table_width(1)
        shape = (config.num_key_value_heads, pages // _COPIES, page_size, config.head_dim)
        rng = np.random.default_rng(0)
        block = rng.standard_normal(shape, np.float32).astype(dtype)
        k, v = (jax.device_put(_copies(x)) for x in (block, -block))
        q = rng.standard_normal((1, 1, config.num_attention_heads, config.head_dim), np.float32)
        return cls(config, k, v, q, Window(page_size, 64))

    @property
    def length(self) -> int:
        """Keys."""
        return (self.k.shape[1] - 1) * self.k.shape[2]

    def compiled(self, name: str) -> Timed:
        """A program: "full", "flat", "sketch", "pages" or "graph"; "narrow sketch" and "narrow
        pages" have a page table a part as wide.
        """
        if name == "flat":
            return self._scores()
        plan, index, pages = Plan(Full()), None, self.k.shape[1] - 1
        kind, narrow = name.removeprefix("narrow "), name.startswith("narrow ")
        if kind in ("sketch", "pages"):
            query = DIPR(recovery=0.95, window=self.window)
            plan = Plan(query, Sketch())
            if kind == "pages":
                plan = Plan(query, Sketch(), by="page", share="group")
            with self.building:
                index = self._sketch
            pages = table_width(1) if narrow else pages
        elif name == "graph":
            plan, index = Plan(DIPR(beta=0.0, window=self.window), Graph()), (self._graph(),)

        def args(scale: float, length: int, beta: float | None = None) -> tuple:
            query = plan.query if beta is None else DIPR(beta=beta, window=self.window)
            ids = np.arange(1, pages + 1, dtype=np.int32)[None]
            table = PageTable(*jax.device_put((ids, np.full(1, length - 1, np.int32))))
            q = (scale * self.q).astype(self.k.dtype)
            covered: Any = np.full(1, length, np.int32)
            one = np.ones(1, np.int32)
            asked = dataclasses.replace(plan, query=query)
            return asked, q, LayerMemory(self.k, self.v, table, index, covered), one

        run = engine.attend.lower(*args(1.0, pages * self.k.shape[2])).compile()

        def timed(scale: float, length: int, beta: float | None = None) -> tuple[float, Any]:
            call = functools.partial(run, *args(scale, length, beta))
            return least(call), jax.tree.map(np.asarray, call()[1])

        return timed

    def _scores(self) -> Timed:
        """Exact scores of all keys: what `Flat` does before it chooses."""
        group = self.config.group_size

        @jax.jit
        def scores(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> jax.Array:
            pages = Pages(k, v, jnp.arange(1, k.shape[1]))
            return Flat().scan(q, pages, KeyRange(jnp.zeros_like(end), end)).estimate

        def args(length: int) -> tuple:
            q = self.q.reshape(len(self.k), group, 1, -1).astype(self.k.dtype)
            return q, self.k, self.v, np.full(1, length, np.int32)

        run = scores.lower(*args(self.length)).compile()
        return lambda scale, length, beta: (least(functools.partial(run, *args(length))), None)

    @functools.cached_property
    def _sketch(self) -> Any:
        """Of the keys that are drawn; the others are copies of them."""
        count, size = (self.k.shape[1] - 1) // _COPIES, self.k.shape[2]
        pages = [np.asarray(x[:, : count + 1]) for x in map(np.asarray, (self.k, self.v))]
        layer = Sketch().create(self.config, count + 1, size, self.k.dtype)
        ids, filled = np.arange(1, count + 1), np.full(count, size)
        layer = jax.jit(lambda layer, *args: layer.build(*args))(layer, *pages, ids, filled)
        return jax.device_put(jax.tree.map(lambda x: _copies(np.asarray(x)[:, 1:]), layer))

    def _graph(self) -> GraphLayer:
        """Neighbours at random."""
        rng = np.random.default_rng(1)
        heads, degree = self.config.num_key_value_heads, Graph().degree
        near = rng.integers(0, self.length, (heads, self.length, degree), np.int32)
        starts = near[:, :STARTS, 0]
        return GraphLayer(*jax.device_put((near, starts, np.int32(self.length))))


def _copies(pages: np.ndarray) -> np.ndarray:
    """Pages [K, P, ...] again and again, behind one that belongs to nobody."""
    return np.concatenate([pages[:, :1], *[pages] * _COPIES], axis=1)


def least(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls."""
    jax.block_until_ready(call())
    times = []
    while len(times) < CALLS or sum(times) < SECONDS:
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return min(times)
