"""Attention over a part of the keys, and the sum of parts.

`out` is the softmax-weighted mean of the values of one disjoint set of keys, `lse` the log of the
sum of their exponentiated scores. Any number of parts merge to exactly the attention over their
union (FlashAttention's rescaling; RetrievalAttention, arXiv 2409.10516, appendix B.1). One
function serves window and retrieved keys, shards of a mesh, tiers, and chunks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


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


def share_read(read: Float[Array, "..."], unread: Float[Array, "..."]) -> Float[Array, "..."]:
    """The share of the mass that was read, from the log-sum-exp of what was and what was not."""
    none = jnp.isneginf(unread)  # and there may be no key at all
    return jnp.where(none, 1.0, 1 / (1 + jnp.exp(jnp.where(none, 0.0, unread - read))))


def merge_across(part: Partial, axis: str | None) -> Partial:
    """Attention over the keys of all devices along a mesh axis, each of which holds a part."""
    if axis is None:
        return part
    top = lax.pmax(lax.stop_gradient(part.lse), axis)  # cancels; a pmax has no derivative
    weight = jnp.exp(part.lse - jnp.where(jnp.isneginf(top), 0.0, top))
    total = lax.psum(weight, axis)
    out = lax.psum(weight[..., None] * part.out, axis)
    safe = jnp.where(total > 0, total, 1.0)
    return Partial(out / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), -jnp.inf))


def merge(*parts: Partial) -> Partial:
    """Attention over the union of disjoint sets of keys."""
    lse = jnp.stack([part.lse for part in parts])
    top = jnp.max(lse, axis=0)
    # An empty set everywhere would be -inf - -inf.
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0.0, top))
    total = jnp.sum(weights, axis=0)
    out = sum(w[..., None] * part.out for w, part in zip(weights, parts, strict=True))
    safe = jnp.where(total > 0, total, 1.0)
    return Partial(out / safe[..., None], jnp.where(total > 0, top + jnp.log(safe), -jnp.inf))
