"""Graph indexes of stored contexts: built from a pass of the model, read back, lent to sessions."""

import dataclasses
import math
import mmap
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from alaya_jax.cache.pool import PagedSequence, PagePool
from alaya_jax.errors import ContextError, GraphError, RequestError
from alaya_jax.index import Graph, GraphLayer, Indexed
from alaya_jax.index.graph import build as graph_build
from alaya_jax.index.room import Part
from alaya_jax.model import Model
from alaya_jax.progress import progress_bar
from alaya_jax.query import Full
from alaya_jax.query.plan import Plan
from alaya_jax.runtime.programs import Fed
from alaya_jax.runtime.reading import Reading
from alaya_jax.runtime.stack import Stack
from alaya_jax.storage import ContextStore, checked

KIND = "graph"
"""What the store calls it."""


class _Built(NamedTuple):
    """A context's graph, as accounts of memory name it.

    Attributes:
      id: of the context.
      settings: that it was built with.
    """

    id: str
    settings: tuple[Any, ...]

    def __repr__(self) -> str:
        return f"the graph of context {self.id}"


CHUNK = 512
"""Tokens of one pass of the model."""


def build_layers(
    stack: Stack,
    pool: PagePool,
    sequence: PagedSequence,
    tokens: np.ndarray,
    index: Graph,
    *,
    progress: bool,
) -> Iterator[dict[str, np.ndarray]]:
    """The graph of each layer of a context, one after another, as the store keeps it.

    The model runs over the context once more, with its keys and values where they are, for the
    queries that it asks. On the device are the keys of one layer; on the host a share of all
    queries, at most `index.queries * n` for each layer and kv head.

    Args:
      stack, pool: the model's layers, and where the context is.
      sequence: its pages, in all layers.
      tokens: its ids, int32 [n].
      index: how to build.
      progress: shows bars on stderr when it is a terminal.
    """
    c, n = stack.frame.config, len(tokens)
    kv_heads, group = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
    with progress_bar("asking what the document asks", n, show=progress) as advance:
        asked, at = [], []
        for queries, positions in _asked(stack, pool, sequence, tokens, index):
            asked.append(queries)
            at.append(positions)
            advance(min(CHUNK, n))
    positions = np.repeat(np.concatenate(at), group)
    positions = np.broadcast_to(positions, (kv_heads, len(positions)))
    with progress_bar("building the graph", n * c.num_hidden_layers, show=progress) as advance:
        for layer in range(c.num_hidden_layers):
            q = np.concatenate([queries[layer] for queries in asked])  # [t, H, D]
            q = q.reshape(len(q), kv_heads, group, -1).swapaxes(0, 1)
            done = 0

            def on_block(blocks: int, of: int) -> None:
                nonlocal done
                now = n * blocks // of
                advance(now - done)
                done = now

            graph = graph_build.build(
                jnp.asarray(pool.read(sequence, layer)[0]),
                n,
                jnp.asarray(q.reshape(kv_heads, -1, q.shape[-1])),
                jnp.asarray(positions),
                low=min(index.sink, n - 1),
                spec=index.spec,
                on_block=on_block,
            )
            yield {
                "neighbours": np.asarray(graph.neighbours)[:, :n],
                "starts": np.asarray(graph.starts),
            }


def _asked(
    stack: Stack,
    pool: PagePool,
    sequence: PagedSequence,
    tokens: np.ndarray,
    index: Graph,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunk by chunk, queries of evenly chosen tokens [L, m, H, D], and the tokens' positions."""
    c = stack.frame.config
    group = c.num_attention_heads // c.num_key_value_heads
    step = max(1, math.ceil(group / index.queries))  # every head of a group asks
    none = (None,) * c.num_hidden_layers
    host = None if sequence.host is None else sequence.host.layers
    indexed = Indexed(none, np.zeros(1, np.int32), host)  # type: ignore[arg-type]
    plan = Plan(Full())
    chain = stack.chain(plan, stack.put(indexed), Reading(pool, [sequence], plan))
    for first in range(0, len(tokens), CHUNK):
        part = tokens[first : first + CHUNK]
        chunk = np.zeros((1, CHUNK), np.int32)
        chunk[0, : len(part)] = part
        # The last token of each step; of a context shorter than that, its last.
        chosen = np.arange(step - 1 - first % step, len(part), step)
        if not first and not len(chosen):
            chosen = np.array([len(part) - 1])
        take = np.zeros(-(-CHUNK // step), np.int32)
        take[: len(chosen)] = chosen
        so_far = dataclasses.replace(pool.table([sequence]), length=jnp.asarray([first], jnp.int32))
        fed = Fed(chunk, np.asarray([len(part)], np.int32), so_far)  # type: ignore[arg-type]
        with pool.lock:
            asked = list(stack.queries(pool.kv, chain, stack.put(fed), take))
        queries = np.stack([np.asarray(q)[0] for q in asked])
        yield queries[:, : len(chosen)], first + chosen


def part(id: str, n: int, index: Graph, pool: PagePool, layer: int) -> dict[Part, int]:
    """What one layer of a context's graph takes of memory where a pool of pages is, see `load`.

    Args:
      id, n: of the context, and its tokens.
      index: as it is built.
      pool: whose devices.
      layer: which.
    """
    return {(_Built(id, tuple(index.built.values())), layer): _nbytes(n, index, pool)}


def _nbytes(n: int, index: Graph, pool: PagePool) -> int:
    short, row = _short(n), 4 * pool.config.num_key_value_heads
    rows, starts = (n + short) * index.degree * row, graph_build.default_starts(n) * row
    on_cpu = pool.mesh is None and pool.target.platform == "cpu"
    stays_in_its_file = on_cpu and not short and rows >= checked.MAPPED
    return starts + (0 if stays_in_its_file else rows)


def _short(n: int) -> int:
    """Rows that a graph of so many keys is padded with: there are four sizes an octave."""
    return -n % max(256, (1 << n.bit_length()) // 8)


def check(store: ContextStore, id: str, wanted: Graph) -> None:
    """Whether a context has such a graph; raises as `load`."""
    record = store.indexes(id).get(KIND)
    way_out = "build it with db.build_index(context, aj.Graph(...)), or use aj.Sketch()"
    if record is None:
        raise GraphError(f"context {id} has no graph index; {way_out}")
    if record.problem is not None:
        raise GraphError(record.problem)
    if dict(record.settings) != wanted.built:
        raise RequestError(
            f"the graph index of context {id} was built with {dict(record.settings)}, and the plan "
            f"asks for {wanted.built}; ask for the same, or {way_out}"
        )


def load(store: ContextStore, id: str, wanted: Graph, pool: PagePool, layer: int) -> GraphLayer:
    """One layer of a context's graph, where a pool of pages is.

    Rows are padded to one of four sizes an octave, since a program is compiled for each size. On a
    CPU a graph that has such a size stays in its file, mapped: what is walked comes into memory.

    Raises:
      GraphError: there is none, or it is damaged.
      RequestError: it was built with other settings.
    """
    check(store, id, wanted)
    try:
        arrays = store.read_index(id, KIND, layer)
    except ContextError as error:
        raise GraphError(str(error)) from error
    near, starts = arrays["neighbours"], arrays["starts"]
    n = near.shape[1]
    if short := _short(n):
        near = np.pad(near, ((0, 0), (0, short), (0, 0)), constant_values=-1)
    elif isinstance(near.base, mmap.mmap):
        near.base.madvise(mmap.MADV_RANDOM)  # a walk reads a row here and a row there
    with pool.here():
        return GraphLayer(_place(near, pool), _place(starts, pool), jnp.asarray(n, jnp.int32))


def _place(x: np.ndarray, pool: PagePool) -> jax.Array:
    if pool.mesh is None:
        return jax.device_put(x)
    heads = PartitionSpec(pool.rules.axis("kv_heads", pool.mesh))
    return jax.device_put(x, NamedSharding(pool.mesh, heads))


def of_prefix(graph: GraphLayer, reused: int) -> GraphLayer:
    """What a graph knows of a session that reuses so many tokens of its context."""
    return dataclasses.replace(graph, length=jnp.minimum(graph.length, reused))


def require_no_context_axis(where: Model | PagePool, what: Any) -> None:
    """Raises RequestError where pages are spread over devices: a walk needs all keys of a head."""
    axis = where.rules.axis("pages", where.mesh)
    if axis is not None and where.mesh is not None and where.mesh.shape[axis] > 1:
        raise RequestError(
            f"{what}: the pages are spread over mesh axis {axis!r}, and a search of a graph needs "
            "all keys of a head on one device; use aj.Sketch() or aj.Flat(), or a mesh without "
            "that axis"
        )
