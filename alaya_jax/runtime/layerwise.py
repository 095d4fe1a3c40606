"""A session run by a model of the user's own, which calls `update` and `attention` in each layer.

The cache holds new tokens layer by layer then: `Batch.ahead` counts those that some layers have
and others do not, and lengths grow when all have them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from alaya_jax.attention import engine
from alaya_jax.attention.counts import Counts
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.errors import RequestError
from alaya_jax.frame import Frame
from alaya_jax.index.memory import Memory
from alaya_jax.query.origin import Way
from alaya_jax.query.plan import Plans, of_layer
from alaya_jax.runtime.batch import Batch, OnRead
from alaya_jax.sharding import laid, whole


def update(
    batch: Batch,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    layer: int,
    return_kv: bool,
) -> tuple[Array | None, Array | None]:
    """See `Session.update`."""
    if any(batch.pending):
        raise RequestError(
            "update: the last generated token is not in the cache yet; call prefill(()) first"
        )
    if return_kv and batch.size != 1:
        raise RequestError("update: return_kv is for a session of one sequence")
    c = batch.model.config
    t = _tokens_of(k)
    shape = (batch.size, t, c.num_key_value_heads, c.head_dim)
    if np.shape(k) != shape or np.shape(v) != shape or not 0 <= layer < c.num_hidden_layers:
        raise RequestError(
            f"update: k {np.shape(k)}, v {np.shape(v)}, layer {layer}; this session takes {shape} "
            f"and layers 0 to {c.num_hidden_layers - 1}"
        )
    batch.turn += 1
    start = batch.ahead[layer]
    for sequence in batch.sequences:
        batch.pool.reserve(sequence, int(start) + t)
    table = _table(batch, layer)
    count = np.full(batch.size, t, np.int32)
    args = batch.stack.at_cache((table, count, k, v))
    frame = dataclasses.replace(batch.model.frame, mesh=batch.pool.mesh)
    with batch.pool.here(), batch.pool.lend() as lent:
        new = _append(lent.kv.part(layer, 1), *args, frame=frame)
        lent.kv = lent.kv.replace_part(layer, new)
    batch.ahead[layer] += t
    done = int(batch.ahead.min())
    if done:
        batch.ahead -= done
        for sequence in batch.sequences:
            sequence.length += done
    if not return_kv:
        return None, None
    n = batch.lengths[0] + int(batch.ahead[layer])
    full_k, full_v = batch.pool.gather(batch.sequences[0], layer, n)
    return full_k[:, :n], full_v[:, :n]


def queries(batch: Batch, q: Float[Array, "B T H D"], layer: int) -> int:
    """T, of queries that `attention` can answer.

    Raises:
      RequestError: of another shape or layer, or more tokens than there are.
    """
    c = batch.model.config
    t = _tokens_of(q)
    shape = (batch.size, t, c.num_attention_heads, c.head_dim)
    held = min(batch.lengths) + int(batch.ahead[layer]) if 0 <= layer < len(batch.ahead) else -1
    if np.shape(q) != shape or t > held:
        raise RequestError(
            f"attention: q {np.shape(q)}, layer {layer}; this session takes {shape} of the last "
            f"tokens and layers 0 to {c.num_hidden_layers - 1}; call update() first"
        )
    return t


def attention(
    batch: Batch, q: Float[Array, "B T H D"], layer: int, plans: Plans, on_read: OnRead
) -> Float[Array, "B T H D"]:
    """See `Session.attention`; `queries` has looked at q."""
    c, t = batch.model.config, _tokens_of(q)
    batch.place(plans)
    batch.ask_from(layer, plans)
    batch.reading(plans).require_room()
    table = _table(batch, layer)
    table = dataclasses.replace(table, length=table.length - t)
    pool, place = batch.pool, getattr(q, "sharding", None)
    count = np.full(batch.size, t, np.int32)
    with pool.here(), pool.lock:
        kv = pool.kv
        # Full pages of whole tokens: what `update` wrote in some layers only is not in them.
        indexed = batch.cover(plans, only=layer)
        batch.reading(plans).before(layer, 1, kv.k[layer])
        out, counts = engine.attend(
            of_layer(plans, layer),
            batch.stack.at_cache(q),
            Memory(kv, table, indexed).layer(layer),
            count,
            mesh=pool.mesh,
            rules=pool.rules,
        )
    met = batch.verify_met(plans, None if counts.met is None else counts.met[None], layer)
    counts = dataclasses.replace(counts, met=None)
    way = Way.of(of_layer(plans, layer))
    for b, length in enumerate(batch.lengths):
        end, origin = length + int(batch.ahead[layer]), batch.origins[b]
        if way.name not in [name for _, name in origin.runs]:  # once, not by turns with a layer's
            batch.origins[b] = origin.then(end - t, end, way)
    by_layer = _of_layer(counts, layer, layers=c.num_hidden_layers, place=whole(pool.mesh))
    # The account is kept by token: the last layer closes it.
    counted = [t if layer == c.num_hidden_layers - 1 else 0] * batch.size
    on_read(by_layer, np.asarray(table.length).tolist(), counted, t, met)
    return out if pool.device is None or place is None else jax.device_put(out, place)


def _tokens_of(array: Any) -> int:
    """T of an array [B, T, ...]; of another shape 0, which fits no request."""
    return np.shape(array)[1] if np.ndim(array) == 4 else 0


def _table(batch: Batch, layer: int) -> PageTable:
    """Pages, and lengths with what the layer has ahead of others."""
    table = batch.pool.table(batch.sequences)
    return dataclasses.replace(table, length=table.length + int(batch.ahead[layer]))


@functools.partial(jax.jit, static_argnames=("frame",), donate_argnames=("kv",))
def _append(
    kv: PagedKV,
    table: PageTable,
    count: Array,
    k: Array,
    v: Array,
    *,
    frame: Frame,
) -> PagedKV:
    """`engine.append` to a cache of one layer: one program for all layers."""
    where: Any = {"mesh": frame.mesh, "rules": frame.rules}
    return laid(engine.append(kv, 0, k, v, table, count, **where), frame.rules.pool(frame.mesh))


@functools.partial(jax.jit, static_argnames=("layers", "place"))
def _of_layer(counts: Counts, layer: int, *, layers: int, place: NamedSharding | None) -> Counts:
    """What was read in one layer, [B, T, H], as sums [L, B, H] of all layers."""
    here = (jnp.arange(layers) == layer)[:, None, None]
    return laid(jax.tree.map(lambda x: jnp.where(here, x.sum(1), 0), counts), place)
