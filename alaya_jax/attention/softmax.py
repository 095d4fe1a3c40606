"""Softmax over keys that come in parts, one part after another or each for itself.

One after another (`start`, `fold`, `finish`): the running maximum may rise with each part, and what
was summed until then fades by that much, as in FlashAttention (arXiv 2205.14135).

Each for itself (`Partial`, `merge`): `out` is the softmax-weighted mean of the values of one
disjoint set of keys, `lse` the log of the sum of their exponentiated scores. Any number of parts
merge to exactly the attention over their union (RetrievalAttention, arXiv 2409.10516, appendix
B.1). Window and retrieved keys, shards of a mesh, tiers and chunks all merge by this.

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
    """The softmax of the keys met so far.

    Attributes:
      top: float32 [...], the best raw score.
      total: float32 [...], sum of `exp(scale * (score - top))`.
      acc: float32 [..., D], the same sum with the values; None if no values are summed.
    """

    top: Float[Array, "..."]
    total: Float[Array, "..."]
    acc: Float[Array, "... D"] | None


def start(rows: tuple[int, ...], dim: int | None = None) -> Running:
    """Before the first key. `dim` is the values' width; None if only scores will come."""
    acc = None if dim is None else jnp.zeros((*rows, dim))
    return Running(jnp.full(rows, _LOW), jnp.zeros(rows), acc)


def fold(
    running: Running,
    scores: Float[Array, "... S"],
    scale: float,
    weigh: Callable[[Array], Float[Array, "... D"]] | None = None,
    best: Float[Array, "..."] | None = None,
) -> Running:
    """Adds some keys.

    Args:
      running: of the keys before them.
      scores: raw; -inf for keys that do not count.
      scale: of a score.
      weigh: from the weights of these keys to the sum of their values so weighted.
      best: the largest of the scores, where it is known already.
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
    """The best raw score; -inf where no key was met."""
    return jnp.where(running.total > 0, running.top, -jnp.inf)


def lse_of(running: Running, scale: float) -> Float[Array, "..."]:
    """Log of the sum of exponentiated scores; -inf where no key was met."""
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
    """Attention over the keys met."""
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
    """Attention over the keys of all devices along a mesh axis, each of which holds a part."""
    if axis is None:
        return part
    top = lax.pmax(lax.stop_gradient(part.lse), axis)  # cancels; a pmax has no derivative
    weight = _weight(part.lse, top)
    total = lax.psum(weight, axis)
    out = lax.psum(weight[..., None] * part.out, axis)
    return Partial(out / _safe(total)[..., None], _log(top, total))


def share_read(read: Float[Array, "..."], unread: Float[Array, "..."]) -> Float[Array, "..."]:
    """The share of the mass that was read, from the log-sum-exp of what was and what was not."""
    none = jnp.isneginf(unread)  # and there may be no key at all
    return jnp.where(none, 1.0, 1 / (1 + jnp.exp(jnp.where(none, 0.0, unread - read))))


def _weight(lse: Array, top: Array) -> Array:
    """Of a part; an empty set everywhere would be -inf - -inf."""
    return jnp.exp(lse - jnp.where(jnp.isneginf(top), 0.0, top))


def _safe(total: Array) -> Array:
    return jnp.where(total > 0, total, 1.0)


def _log(top: Array, total: Array) -> Array:
    return jnp.where(total > 0, top + jnp.log(_safe(total)), -jnp.inf)
