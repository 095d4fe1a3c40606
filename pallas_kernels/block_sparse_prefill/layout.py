"""What every implementation agrees on: sizes, and the order in which tiles are visited."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

QUERY_BLOCK = 128
"""Queries that share a list of key blocks."""

ROWS = 64
"""Queries of a tile, of one head: the unit that is skipped."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lists:
    """Which blocks of keys are attended, in which order.

    Attributes:
      blocks: int32 [B, J, QB, M], ids, for each kv head or each query head (J is K or H).
      count: int32 [B, J, QB], how many of them.
      kept: int32 [B, J, QB], how many come first that are never skipped.
    """

    blocks: Int[Array, "B J QB M"]
    count: Int[Array, "B J QB"]
    kept: Int[Array, "B J QB"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
    """Attention of a chunk of queries.

    Attributes:
      out: [B, T, H, D] of the queries' dtype; zeros where no key is attended.
      lse: float32 [B, H, T], natural log of the sum of exp(scale * score); -inf where no key is
        attended.
      skipped: int32 [B, H, ceil(T / 64)], tiles that were listed and skipped for `beta`.
    """

    out: Float[Array, "B T H D"]
    lse: Float[Array, "B H T"]
    skipped: Int[Array, "B H QT"]


def pad_queries(q: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    """Whole blocks of queries, zeros behind the last."""
    return jnp.pad(q, ((0, 0), (0, -q.shape[1] % QUERY_BLOCK), (0, 0), (0, 0)))


def visible_blocks(
    lengths: Int[Array, " B"], count: Int[Array, " B"], q_blocks: int, block_kv: int
) -> Int[Array, "B QB"]:
    """Key blocks up to the last that some query of a block may see; 0 if it holds no query."""
    start = jnp.arange(q_blocks) * QUERY_BLOCK
    last = lengths[:, None] + jnp.minimum(start + QUERY_BLOCK, count[:, None])
    return jnp.where(start < count[:, None], -(-last // block_kv), 0)
