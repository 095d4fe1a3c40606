"""What all implementations share: sizes, and the order in which tiles are visited."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

QUERY_BLOCK = 128
"""Queries per block; they share a list of key blocks."""

ROWS = 64
"""Queries per tile, all of one head. A tile is the unit that is skipped."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lists:
    """The blocks of keys to attend to, in the order in which they are visited.

    Attributes:
      blocks: int32 [B, J, QB, M], their numbers for each kv head or each query head (J is K or H).
      count: int32 [B, J, QB], how many blocks each list has.
      kept: int32 [B, J, QB], how many of them, at the front, are never skipped.
    """

    blocks: Int[Array, "B J QB M"]
    count: Int[Array, "B J QB"]
    kept: Int[Array, "B J QB"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
    """Attention of a chunk of queries.

    Attributes:
      out: [B, T, H, D] in the queries' dtype; zeros for a query that attends to no key.
      lse: float32 [B, H, T], natural log of the sum of exp(scale * score); -inf for a query that
        attends to no key.
      skipped: int32 [B, H, ceil(T / 64)], tiles that were listed but skipped because of `beta`.
    """

    out: Float[Array, "B T H D"]
    lse: Float[Array, "B H T"]
    skipped: Int[Array, "B H QT"]


def pad_queries(q: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    """The queries, padded with zeros to whole blocks."""
    return jnp.pad(q, ((0, 0), (0, -q.shape[1] % QUERY_BLOCK), (0, 0), (0, 0)))


def visible_blocks(
    lengths: Int[Array, " B"], count: Int[Array, " B"], q_blocks: int, block_kv: int
) -> Int[Array, "B QB"]:
    """How many key blocks the queries of a block may see, from the first on; 0 without a query."""
    start = jnp.arange(q_blocks) * QUERY_BLOCK
    last = lengths[:, None] + jnp.minimum(start + QUERY_BLOCK, count[:, None])
    return jnp.where(start < count[:, None], -(-last // block_kv), 0)
