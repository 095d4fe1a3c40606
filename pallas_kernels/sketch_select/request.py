"""Arguments and results of a scan, and the step from the bounds of pages to lists of pages."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float16, Int, Int8, UInt8, UInt32

from alaya_jax.pallas_kernels.page_lists import compact


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """Keys of one layer at 4 bits a channel.

    A key is estimated as the centre of its page plus, in a rotated basis, `scale` times its levels.
    The level of a field c (two's complement) is 2 c + 1.

    Attributes:
      codes: uint8 [K, P, Z, D / 2]; byte m holds channel m in its low half and channel m + D / 2
        in its high half.
      scale: float16 [K, P, Z], factor of a key's levels.
      spread: float16 [K, P, Z], to which the error of a score is proportional; inf if nothing is
        known of the key.
      centre: int8 [K, P, D], the centre of the page in multiples of `unit`, not rotated.
      unit: float16 [K, P].
    """

    codes: UInt8[Array, "K P Z D/2"]
    scale: Float16[Array, "K P Z"]
    spread: Float16[Array, "K P Z"]
    centre: Int8[Array, "K P D"]
    unit: Float16[Array, "K P"]

    @staticmethod
    def levels(codes: UInt8[Array, "... Z D/2"]) -> Int8[Array, "... Z D"]:
        """The levels of some keys."""
        return 2 * _halves(codes) + 1

    @staticmethod
    def centres(centre: Int8[Array, "... D"]) -> Int8[Array, "... D"]:
        """The integers of some centres."""
        return centre


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Signs:
    """Keys of one layer as F signs each, of channels with more and with fewer of them.

    A key is estimated as the centre of its page plus `scale` times its signs, each of which the
    query's integers give its weight.

    Attributes:
      codes: uint32 [K, P, W, Z], W = F / 32; bit i of word w is sign 32 w + i, set where positive.
      scale, spread: as in `Codes`.
      centre: uint8 [K, P, D / 2], 4-bit fields in multiples of `unit`, two's complement; byte m
        holds channel m in its low half and channel m + D / 2 in its high half.
      unit: float16 [K, P].
    """

    codes: UInt32[Array, "K P W Z"]
    scale: Float16[Array, "K P Z"]
    spread: Float16[Array, "K P Z"]
    centre: UInt8[Array, "K P D/2"]
    unit: Float16[Array, "K P"]

    @staticmethod
    def levels(codes: UInt32[Array, "... W Z"]) -> Int8[Array, "... Z F"]:
        """The signs of some keys, 1 and -1."""
        words = jnp.swapaxes(codes, -1, -2)[..., None]
        bits = ((words >> jnp.arange(WORD, dtype=jnp.uint32)) & 1).astype(jnp.int8)
        return (2 * bits - 1).reshape(*bits.shape[:-2], -1)

    @staticmethod
    def centres(centre: UInt8[Array, "... D/2"]) -> Int8[Array, "... D"]:
        """The integers of some centres."""
        return _halves(centre)


WORD = 32
"""Signs in a word."""


def _halves(codes: UInt8[Array, "... D/2"]) -> Int8[Array, "... D"]:
    """4-bit fields, two's complement: those of the low halves, then those of the high ones."""
    byte = lax.bitcast_convert_type(codes, jnp.int8)
    return jnp.concatenate([(byte << 4) >> 4, byte >> 4], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Query:
    """One query token per sequence, in the form that a scan takes.

    Attributes:
      q: [B, H, D], in the dtype of the keys, for the products with the centres.
      integers: int8 [B, H, F], the query's weights of a key's levels in multiples of `step`,
        rounded; F is D for `Codes`.
      step: float32 [B, H].
      of_spread, of_scale: float32 [B, H]; the error of an estimate is `of_spread` times the key's
        spread plus `of_scale` times its scale. If `of_spread` is 0, the spread does not count, even
        if it is inf.
      offset: float32 [B, H], what the scores of all keys have beside their estimates; None: 0.
    """

    q: Float[Array, "B H D"]
    integers: Int8[Array, "B H F"]
    step: Float[Array, "B H"]
    of_spread: Float[Array, "B H"]
    of_scale: Float[Array, "B H"]
    offset: Float[Array, "B H"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """The result of a scan. Heads are [K, G]: the G query heads of each kv head.

    Attributes:
      upper: float32 [B, K, N, G], the largest estimate + error of the page's keys in range;
        undefined for pages without one.
      best: float32 [B, K, G], the largest estimate - error of all keys in range; -inf without any.
      lse: float32 [B, K, N, G], log-sum-exp of scale * estimate over the page's keys in range;
        undefined for pages without one. None unless requested.
    """

    upper: Float[Array, "B K N G"]
    best: Float[Array, "B K G"]
    lse: Float[Array, "B K N G"] | None

    def plus(self, offset: Float[Array, "B H"], scale: float | None) -> "Bounds":
        """Of scores that are higher by an offset; `scale`: that of `lse`."""
        batch, kv_heads, _, group = self.upper.shape
        offset = offset.reshape(batch, kv_heads, group)
        of_page = offset[:, :, None]
        lse = None if self.lse is None or scale is None else self.lse + scale * of_page
        return Bounds(self.upper + of_page, self.best + offset, lse)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selected:
    """The pages that may hold a key in range of some head of the group.

    Attributes:
      page_ids: int32 [B, K, C], in the order of the sequence.
      starts: int32 [B, K, C], position of the first token of each.
      count: int32 [B, K], how many there are. If they are more than C, the lists hold the first C;
        entries past the count mean nothing.
      best: float32 [B, H], the score from which the range was measured.
      page_lse: float32 [B, H, N], estimated log of the sum of exp(scale * score) over the keys in
        range of each page; -inf for pages without one. None unless requested.
    """

    page_ids: Int[Array, "B K C"]
    starts: Int[Array, "B K C"]
    count: Int[Array, "B K"]
    best: Float[Array, "B H"]
    page_lse: Float[Array, "B H N"] | None


def select(
    bounds: Bounds,
    pages: Int[Array, "B N"],
    low: Int[Array, " B"],
    high: Int[Array, " B"],
    beta: Float[Array, "B H"],
    best: Float[Array, "B H"] | None,
    page_size: int,
    capacity: int,
) -> Selected:
    """Lists the pages whose upper bound reaches the best score - beta for a head of the group."""
    batch, _, n, _ = bounds.upper.shape
    top = bounds.best.reshape(batch, -1)
    if best is not None:
        top = jnp.maximum(top, best)
    keep = wanted(bounds, top - beta, low, high, page_size)
    kept = compact(keep, capacity)
    lse = None
    if bounds.lse is not None:
        some = in_range(n, page_size, low, high)
        lse = jnp.where(some[:, None, :, None], bounds.lse, -jnp.inf)
        lse = jnp.moveaxis(lse, 3, 2).reshape(batch, -1, n)
    return Selected(
        page_ids=jnp.take_along_axis(pages[:, None], kept.index, axis=2),
        starts=kept.index * page_size,
        count=kept.count,
        best=top,
        page_lse=lse,
    )


def wanted(
    bounds: Bounds,
    threshold: Float[Array, "B H"],
    low: Int[Array, " B"],
    high: Int[Array, " B"],
    page_size: int,
) -> Bool[Array, "B K N"]:
    """Which pages have a key in range that may reach the threshold of some head of the group."""
    batch, kv_heads, n, group = bounds.upper.shape
    least = threshold.reshape(batch, kv_heads, 1, group)
    reaches = jnp.any((bounds.upper >= least) & (bounds.upper > -jnp.inf), axis=-1)
    return reaches & in_range(n, page_size, low, high)[:, None]


def in_range(
    n: int, page_size: int, low: Int[Array, " B"], high: Int[Array, " B"]
) -> Bool[Array, "B N"]:
    """Which pages of a sequence hold a position `low <= p < high`."""
    first = jnp.arange(n) * page_size
    return (first + page_size > low[:, None]) & (first < high[:, None]) & (low < high)[:, None]
