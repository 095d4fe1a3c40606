"""Softmax attention over keys that come in parts.

In sequence (`start`, `fold`, `finish`): the online softmax of FlashAttention (arXiv 2205.14135),
which rescales what it has summed whenever the running maximum rises.

Separately (`Partial`, `merge`): `out` is the softmax-weighted mean of the values of one set of
keys, and `lse` is the log of the sum of their exponentiated scores. Parts over disjoint sets merge
to exactly the attention over the union (RetrievalAttention, arXiv 2409.10516, appendix B.1). The
window and the retrieved keys, shards of a mesh, tiers and chunks are all merged like this.

Scores are raw, `q . k`; the factor 1/sqrt(D) is applied in the exponent.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_LOW = float(jnp.finfo(jnp.float32).min)  # finite, so that differences stay defined


class Running(NamedTuple):
    """The state of an online softmax.

    Attributes:
      top: float32 [...], the best raw score so far.
      total: float32 [...], the sum of `exp(scale * (score - top))`.
      acc: float32 [..., D], the sum of the values with these weights; None if none are summed.
    """

    top: Float[Array, "..."]
    total: Float[Array, "..."]
    acc: Float[Array, "... D"] | None


def start(rows: tuple[int, ...], dim: int | None = None) -> Running:
    """The state before the first key; `dim` is the width of the values, None for scores alone."""
    acc = None if dim is None else jnp.zeros((*rows, dim))
    return Running(jnp.full(rows, _LOW), jnp.zeros(rows), acc)


def fold(
    running: Running,
    scores: Float[Array, "... S"],
    scale: float,
    weigh: Callable[[Array], Float[Array, "... D"]] | None = None,
    best: Float[Array, "..."] | None = None,
) -> Running:
    """Adds a part of the keys.

    Args:
      running: the state so far.
      scores: raw scores of the new keys, [..., S]; -inf for keys that do not count.
      scale: factor of the scores, 1/sqrt(D).
      weigh: takes the weights of these keys and returns the weighted sum of their values.
      best: the largest of the scores, if it is already known.
    """
    best = jnp.max(scores, axis=-1) if best is None else best
    top = jnp.maximum(running.top, best)
    p = jnp.exp(scale * (scores - top[..., None]))
    fade = jnp.exp(scale * (running.top - top))
    total = running.total * fade + jnp.sum(p, axis=-1)
    if running.acc is None or weigh is None:
        return Running(top, total, None)
    return Running(top, total, running.acc * fade[..., None] + weigh(p))


def best_of(running: Running) -> Float[Array, "..."]:
    """The best raw score so far; -inf without any key."""
    return jnp.where(running.total > 0, running.top, -jnp.inf)


def lse_of(running: Running, scale: float) -> Float[Array, "..."]:
    """Log of the sum of exponentiated, scaled scores; -inf without any key."""
    return _log(scale * running.top, running.total)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Partial:
    """Attention of some queries over a set of keys.

    Attributes:
      out: float32 [..., D]; zeros for an empty set.
      lse: float32 [...], natural log-sum-exp of the scaled scores; -inf for an empty set.
    """

    out: Float[Array, "... D"]
    lse: Float[Array, "..."]


def finish(running: Running, scale: float) -> Partial:
    """The attention over all keys that were added."""
    assert running.acc is not None
    return Partial(running.acc / _safe(running.total)[..., None], lse_of(running, scale))


def merge(*parts: Partial) -> Partial:
    """Attention over the union of disjoint sets of keys."""
    lse = jnp.stack([part.lse for part in parts])
    top = jnp.max(lse, axis=0)
    weights = _weight(lse, top)
    out = sum(w[..., None] * part.out for w, part in zip(weights, parts, strict=True))
    total = jnp.sum(weights, axis=0)
    return Partial(out / _safe(total)[..., None], _log(top, total))


def merge_across(part: Partial, axis: str | None) -> Partial:
    """Attention over the keys of all devices along a mesh axis, from each device's part."""
    if axis is None:
        return part
    top = lax.pmax(lax.stop_gradient(part.lse), axis)  # it cancels out, and pmax has no derivative
    weight = _weight(part.lse, top)
    total = lax.psum(weight, axis)
    out = lax.psum(weight[..., None] * part.out, axis)
    return Partial(out / _safe(total)[..., None], _log(top, total))


def share_read(read: Float[Array, "..."], unread: Float[Array, "..."]) -> Float[Array, "..."]:
    """The share of the mass that was read, from the log-sum-exps of read and unread keys."""
    none = jnp.isneginf(unread)  # also where there is no key at all
    return jnp.where(none, 1.0, 1 / (1 + jnp.exp(jnp.where(none, 0.0, unread - read))))


def relative_error(missing: Float[Array, "..."], whole: Partial) -> Float[Array, "..."]:
    """Of an output that misses a vector of this length from its sum of exp(score) * value.

    Args:
      missing: logarithm of that length; -inf for nothing.
      whole: the output.
    """
    norm = jnp.linalg.norm(whole.out, axis=-1)
    none = jnp.isneginf(missing) | jnp.isneginf(whole.lse)
    share = jnp.where(none, 0.0, jnp.exp(jnp.where(none, 0.0, missing - whole.lse)))
    return jnp.where(none, 0.0, share / jnp.where(norm > 0, norm, 1.0))


def _weight(lse: Array, top: Array) -> Array:
    """The weight of a part; 0 where all sets are empty, which would otherwise be -inf - -inf."""
    return jnp.exp(lse - jnp.where(jnp.isneginf(top), 0.0, top))


def _safe(total: Array) -> Array:
    return jnp.where(total > 0, total, 1.0)


def _log(top: Array, total: Array) -> Array:
    return jnp.where(total > 0, top + jnp.log(_safe(total)), -jnp.inf)
