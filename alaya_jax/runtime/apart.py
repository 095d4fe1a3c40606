"""A model whose cache, and so its attention, is on the CPU beside the devices of its weights.

A context on disk is mapped into the CPU's memory. A GPU, or the devices of a mesh, cannot read it
there. So what they make of each layer goes in three programs:

    ask      on the model's devices: queries, keys and values of the new tokens
    answer   on the CPU: keys and values join the cache, and the engine attends, as ever
    go_on    on the model's devices: the rest of the layer

Only q, k, v and the answer cross, and nothing of the cache takes memory of the model's devices
(AlayaDB, section 7.2; as RetrievalAttention, arXiv 2409.10516, attends on the CPU).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from alaya_jax.attention.counts import Counts
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.cache.pool import Lent
from alaya_jax.frame import Frame
from alaya_jax.models import llama
from alaya_jax.models.llama import Params
from alaya_jax.runtime.programs import (
    Asked,
    Fed,
    Going,
    Passed,
    Row,
    alike,
    attended,
    by_the_compiler,
    embedded,
    last_of,
    put_rows,
)
from alaya_jax.runtime.sampling.sampler import Processors
from alaya_jax.runtime.stack import Chain, Stack
from alaya_jax.settings import under_own_settings
from alaya_jax.sharding import laid, whole


class Apart(Stack):
    """The layers of one model, for a cache on the CPU."""

    def __init__(self, params: Params, frame: Frame, home: Any):
        """Args: parameters; what is static of their programs; the CPU."""
        super().__init__(params, frame, 1)
        self._home = home
        self._home_frame = dataclasses.replace(frame, mesh=None)
        self._there = whole(frame.mesh) or self._device or jax.devices()[0]

    def at_cache(self, tree: Any) -> Any:
        """See `Stack.at_cache`."""
        return jax.device_put(tree, self._home)

    def _nothing_read(self, batch: int, account: tuple[int, ...] | None) -> Counts:
        return self.at_cache(self._zeros(batch, account))

    def counts(self, passed: Passed) -> Counts:
        """See `Stack.counts`."""
        return passed.counts

    def layers(
        self, lent: Lent, chain: Chain, x: Array, passed: Passed, fed: Fed
    ) -> tuple[Array, Passed]:
        """See `Stack.layers`."""
        new = self._new(fed)
        count, table = self.at_cache((fed.count, fed.table))
        last, layer, counts = passed.last, passed.layer, passed.counts
        shapes = x.shape, fed.table.pages.shape
        for link in chain.links:
            (block,), first = link.blocks, link.group.first
            chain.before(link, layer)
            with self._first("layers", chain, link, shapes):
                x, *qkv = ask(self.outer, block, x, layer, new, frame=self.frame)
                with jax.default_device(self._home):
                    out, kv, counts = answer(
                        lent.kv.part(*link.group),
                        self.at_cache(tuple(qkv)),
                        counts,
                        np.int32(first),
                        table,
                        count,
                        link.asked,
                        frame=self._home_frame,
                    )
                out = jax.device_put(out, self._there)
                x, last, layer = go_on(block, x, out, last, layer, new, frame=self.frame)
            lent.kv = lent.kv.replace_part(first, kv)
            lent.result = layer
        chain.called.add(("layers", shapes))
        return x, Passed(last, layer, counts)

    def _new(self, fed: Fed) -> "New":
        return jax.device_put(New(fed.tokens, fed.count, fed.table.length), self._there)

    def _missing(
        self, kv: PagedKV, chain: Chain, table: PageTable, tokens: int
    ) -> Iterator[tuple[Any, Any, Callable[[], object]]]:
        """None: of one layer each, they are soon made."""
        yield from ()

    def end(
        self,
        passed: Passed,
        going: Going,
        end_ids: Int[Array, "B M"],
        allowed: Any,
        processors: Processors,
    ) -> tuple[Row, Passed, Going]:
        """See `Stack.end`."""
        uncounted: Any = dataclasses.replace(passed, counts=None)
        row, after, going = super().end(uncounted, going, end_ids, allowed, processors)
        none = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), passed.counts)
        row = dataclasses.replace(row, counts=passed.counts)
        return row, dataclasses.replace(after, counts=self.at_cache(none)), going

    def queries(
        self, kv: PagedKV, chain: Chain, fed: Fed, take: np.ndarray
    ) -> Iterator[Float[Array, "B n H D"]]:
        """See `Stack.queries`; they are on the CPU."""
        x, layer = self.between(*fed.tokens.shape), self.put(np.int32(0))
        new, last = self._new(fed), self.start(len(fed.count)).last
        count, table = self.at_cache((fed.count, fed.table))
        shapes = x.shape, fed.table.pages.shape, np.shape(take)
        for link in chain.links:
            (block,) = link.blocks
            chain.before(link, layer)
            with self._first("queries", chain, link, shapes):
                x, *qkv = ask(self.outer, block, x, layer, new, frame=self.frame)
                qkv = self.at_cache(tuple(qkv))
                with jax.default_device(self._home):
                    out = look(
                        kv.part(*link.group), qkv, table, count, link.asked, frame=self._home_frame
                    )
                out = jax.device_put(out, self._there)
                x, last, layer = go_on(block, x, out, last, layer, new, frame=self.frame)
            yield qkv[0][:, take]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class New:
    """New tokens, as the model's devices know them.

    Attributes:
      tokens: padded to T.
      count: how many of the T are real.
      length: tokens before them.
    """

    tokens: Int[Array, "B T"]
    count: Int[Array, " B"]
    length: Int[Array, " B"]


QKV = tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]
"""Of new tokens in a layer: q and k rotated, q unscaled."""


def _layer(
    frame: Frame,
    block: Params,
    x: Array,
    new: New,
    attend: Callable[[Array, Array, Array], tuple[Array, Any]],
) -> tuple[Array, Any]:
    """A layer around `attend`. What of it does not lead to a program's result is not compiled."""
    positions = new.length[:, None] + jnp.arange(x.shape[1])
    rotary = llama.rotation(frame.config, positions, frame.rope_length)
    return llama.run_layers(
        [block], frame.config, x, rotary, lambda layer, q, k, v, state: attend(q, k, v)
    )


@functools.partial(jax.jit, static_argnames=("frame",), donate_argnames=("x",))
@under_own_settings
def ask(
    outer: Params, block: Params, x: Float[Array, "B T E"], layer: Array, new: New, *, frame: Frame
) -> tuple[Array, Array, Array, Array]:
    """What comes into a layer, and the new tokens' q, k and v in it.

    Args:
      outer: see `llama.outer_params`; layer 0 begins with the embedding of the tokens.
      block: parameters of the layer.
      x: what the layer before it made.
      layer: which it is.
      new: the new tokens.
      frame: what is static.
    """

    def run(frame: Frame, outer: Params, block: Params, *rest: Any) -> Any:
        x, layer, new = rest
        x = embedded(frame, outer, x, layer, new.tokens)
        _, qkv = _layer(frame, block, x, new, lambda q, k, v: (jnp.zeros_like(q), (q, k, v)))
        return laid((x, *qkv), whole(frame.mesh))

    return by_the_compiler(run, frame, (PartitionSpec(),) * 4, outer, block, x, layer, new)


@functools.partial(jax.jit, static_argnames=("frame",), donate_argnames=("x", "last"))
@under_own_settings
def go_on(
    block: Params,
    x: Float[Array, "B T E"],
    out: Float[Array, "B T H D"],
    last: Float[Array, "B E"],
    layer: Array,
    new: New,
    *,
    frame: Frame,
) -> tuple[Array, Array, Array]:
    """What a layer makes of an answer; that of each sequence's last new token, or `last` where none
    is new; and the layer that comes next.

    Args:
      block, x, new, frame: as in `ask`.
      out: what attention answered.
      last: of the layer before.
      layer: which it is.
    """

    def run(frame: Frame, block: Params, *rest: Any) -> Any:
        x, out, last, layer, new = rest
        y, _ = _layer(frame, block, x, new, lambda q, k, v: (out.astype(q.dtype), None))
        y = y.astype(x.dtype)
        last = jnp.where((new.count > 0)[:, None], last_of(y, new.count), last)
        return laid((y, last, layer + 1), whole(frame.mesh))

    places = (PartitionSpec(),) * 3
    return by_the_compiler(run, frame, places, block, x, out, last, layer, new)


@functools.partial(jax.jit, static_argnames=("frame",), donate_argnames=("kv", "counts"))
@under_own_settings
def answer(
    kv: PagedKV,
    qkv: QKV,
    counts: Counts,
    layer: Array,
    table: PageTable,
    count: Int[Array, " B"],
    asked: Asked,
    *,
    frame: Frame,
) -> tuple[Float[Array, "B T H D"], PagedKV, Counts]:
    """Attention of new tokens in a layer, which join the cache.

    Args:
      kv: of this layer.
      qkv: theirs.
      counts: what was read, [L, B, H], which the layer's part is written into.
      layer: which it is.
      table, count: pages, lengths before the new tokens; how many are real.
      asked: how the layer attends.
      frame: what is static, without a mesh.
    """
    (plan,), (memory,) = asked.plans, asked.memory(kv, table)
    out, k, v, new = attended(plan, memory, *qkv, count, frame=frame, write=True)
    counts = jax.tree.map(functools.partial(put_rows, layer), counts, *alike(counts, [new]))
    return out, PagedKV((k,), (v,)), counts


@functools.partial(jax.jit, static_argnames=("frame",))
@under_own_settings
def look(
    kv: PagedKV, qkv: QKV, table: PageTable, count: Array, asked: Asked, *, frame: Frame
) -> Float[Array, "B T H D"]:
    """As `answer`, of tokens that are in the cache, which stays as it is."""
    (plan,), (memory,) = asked.plans, asked.memory(kv, table)
    return attended(plan, memory, *qkv, count, frame=frame, write=False)[0]
