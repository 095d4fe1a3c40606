"""Arguments and result of `paged_decode`, in the form that all implementations share."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

LOWEST = -3.0e38
"""A running maximum below every score, but finite, so that differences stay defined."""


class PagedDecode(NamedTuple):
    """Attention of one query token per sequence over the listed keys.

    Attributes:
      out: float32 [B, H, D]; zeros for an empty set.
      lse: float32 [B, H], natural log-sum-exp of the scaled scores; -inf for an empty set.
      best: float32 [B, H], the largest raw score of the keys attended to; -inf for an empty set.
      kept: int32 [B, H], how many keys were attended to; None unless requested.
    """

    out: Float[Array, "B H D"]
    lse: Float[Array, "B H"]
    best: Float[Array, "B H"]
    kept: Int[Array, "B H"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """Which keys a query sees. J is K, or 1 if all kv heads of a sequence share a list.

    Attributes:
      page_ids: int32 [B, J, N], pages in the pool; entries past `count` are never read.
      count: int32 [B, J], how many entries each list has.
      starts: int32 [B, J, N], position of the first token of each listed page; None: entry n is
        page n of the sequence.
      low, high: int32 [B]; positions `low <= p < high` are seen; low may be None: 0.
      gap_low, gap_high: int32 [B]; `gap_low <= p < gap_high` are not seen; None: there is no gap.
      threshold: float32 [B, H]; keys whose raw score `q.k` is below it are not seen; None: no
        threshold.
      mask: bool [B, H, N, Z], which keys of each listed page a query head sees; None: all.
    """

    page_ids: Int[Array, "B J N"]
    count: Int[Array, "B J"]
    starts: Int[Array, "B J N"] | None
    low: Int[Array, " B"] | None
    high: Int[Array, " B"]
    gap_low: Int[Array, " B"] | None
    gap_high: Int[Array, " B"] | None
    threshold: Float[Array, "B H"] | None
    mask: Bool[Array, "B H N Z"] | None

    def of_sequences(self, which: Int[Array, " R"]) -> "Keys":
        """The same for a subset of the sequences, row by row, for use with `seen`."""

        def pick(x: Array | None) -> Array | None:
            return None if x is None else x[which]

        return dataclasses.replace(
            self,
            low=pick(self.low),
            high=self.high[which],
            gap_low=pick(self.gap_low),
            gap_high=pick(self.gap_high),
        )

    def seen(self, positions: Int[Array, "B ..."]) -> Bool[Array, "B ..."]:
        """Whether each position of each sequence is in its range."""

        def row(x: Array) -> Array:
            return x.reshape(-1, *[1] * (positions.ndim - 1))

        inside = positions < row(self.high)
        if self.low is not None:
            inside = inside & (positions >= row(self.low))
        if self.gap_low is None or self.gap_high is None:
            return inside
        return inside & ((positions < row(self.gap_low)) | (positions >= row(self.gap_high)))


def all_starts(keys: Keys, page_size: int) -> Int[Array, "B J N"]:
    """Position of the first token of each listed page."""
    if keys.starts is not None:
        return keys.starts
    starts = jnp.arange(keys.page_ids.shape[2], dtype=jnp.int32) * page_size
    return jnp.broadcast_to(starts, keys.page_ids.shape)


def wrong_shapes(
    q: Any, k_pages: Any, v_pages: Any, keys: Keys, k_scale: Any, v_scale: Any
) -> str | None:
    """Which shapes of a call contradict each other; None if none do."""
    batch, heads, dim = q.shape
    kv_heads, pages, size, kv_dim = k_pages.shape
    if v_pages.shape != k_pages.shape:
        return f"v_pages {v_pages.shape} is not shaped like k_pages {k_pages.shape}"
    if kv_dim != dim or heads % kv_heads:
        return f"q {q.shape} does not fit k_pages {k_pages.shape}: [B, H, D], [K, P, Z, D], H = G K"
    listed = keys.page_ids.shape
    if len(listed) != 3 or listed[0] != batch or listed[1] not in (1, kv_heads):
        return f"page_ids {listed} is not [B, K or 1, N] = [{batch}, {kv_heads} or 1, N]"
    expected: list[tuple[str, Any, tuple[int, ...]]] = [
        ("count", keys.count, listed[:2]),
        ("starts", keys.starts, listed),
        ("low", keys.low, (batch,)),
        ("length", keys.high, (batch,)),
        ("gap_low", keys.gap_low, (batch,)),
        ("gap_high", keys.gap_high, (batch,)),
        ("threshold", keys.threshold, (batch, heads)),
        ("key_mask", keys.mask, (batch, heads, listed[2], size)),
        ("k_scale", k_scale, (kv_heads, pages, size)),
        ("v_scale", v_scale, (kv_heads, pages, size)),
    ]
    for name, array, shape in expected:
        if array is not None and tuple(array.shape) != shape:
            return f"{name} {tuple(array.shape)} is not {shape}"
    for one, other in (("gap_low", "gap_high"), ("k_scale", "v_scale")):
        values = {name: array for name, array, _ in expected}
        if (values[one] is None) != (values[other] is None):
            return f"{one} and {other} are given together or not at all"
    quantized = jnp.dtype(k_pages.dtype).itemsize == 1
    if quantized != (k_scale is not None) or v_pages.dtype != k_pages.dtype:
        return (
            f"pages of {k_pages.dtype} and {v_pages.dtype}: one type, with k_scale and v_scale "
            "where it has 8 bits, without where it has more"
        )
    return None
