"""Attention over the few keys that a selection kept, at a cost proportional to their number.

Prefix sums over pages give each kept key a rank. Keys are read in blocks by rank, each key once for
all queries of its kv head. The loops run for as many blocks as are filled, so no buffer overflows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.attention.softmax import Partial, Running, finish, fold, lse_of, start
from alaya_jax.cache.views import KeyRange, Pages

BLOCK = 256
"""Keys of each kv head that are read at once."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which keys, or which whole pages, each query row keeps.

    Attributes:
      pages: those of the sequence.
      keys: positions that a row may see; keys of a kept page outside them do not count.
      mask: bool [K, G, T, S] by key, or [K, G, T, N] by page.
      by_page: whether the mask is by page.
    """

    pages: Pages
    keys: KeyRange
    mask: Bool[Array, "K G T M"]
    by_page: bool = False

    def blocks(self) -> tuple["Walk", Int[Array, " K"]]:
        """Blocks of the keys that any row of a kv head keeps, and the number of these keys."""
        wanted = jnp.any(self.mask, axis=(1, 2))
        size = self.pages.size
        if self.by_page:
            slots = jnp.broadcast_to(wanted[..., None], (*wanted.shape, size))
        else:
            slots = wanted.reshape(wanted.shape[0], -1, size)
        ends = jnp.cumsum(jnp.sum(slots, axis=-1, dtype=jnp.int32), axis=-1)
        return Walk(slots, ends), ends[:, -1]

    def rows(self, column: Int[Array, "K C"], valid: Bool[Array, "K C"]) -> Bool[Array, "K G T C"]:
        """Which rows keep the keys in these columns."""
        at = column // self.pages.size if self.by_page else column
        at = jnp.minimum(at, self.mask.shape[-1] - 1)
        chosen = jax.vmap(lambda mask, i: mask[..., i])(self.mask, at)
        chosen &= valid[:, None, None]
        if self.by_page:
            chosen &= self.keys.mask(self.pages.position_of(column))[:, None]
        return chosen


@dataclasses.dataclass(frozen=True)
class Walk:
    """The kept keys of each kv head, by rank.

    Attributes:
      slots: bool [K, N, Z], whether the key is kept.
      ends: int32 [K, N], kept keys up to the end of each page.
    """

    slots: Bool[Array, "K N Z"]
    ends: Int[Array, "K N"]

    def block(self, i: Array) -> tuple[Int[Array, "K C"], Bool[Array, "K C"]]:
        """Columns of the BLOCK kept keys from rank i * BLOCK on, and which of these exist."""
        rank = i * BLOCK + jnp.arange(BLOCK)
        size = self.slots.shape[-1]

        def head(slots: Array, ends: Array) -> tuple[Array, Array]:
            page = jnp.searchsorted(ends, rank, side="right")
            here = jnp.take(slots, page, axis=0, mode="clip")  # [C, Z]
            count = jnp.cumsum(here, axis=-1, dtype=jnp.int32)
            skipped = jnp.take(ends, page, mode="clip") - count[:, -1]
            slot = jnp.argmax(count > (rank - skipped)[:, None], axis=-1)
            return page * size + slot, rank < ends[-1]

        return jax.vmap(head)(self.slots, self.ends)


def _walk(
    q: Float[Array, "K G T D"], kept: Kept, visit: Callable[..., Any], start: Any
) -> tuple[Any, Int[Array, " K"]]:
    """Folds `visit(columns, valid, scores, carry)` over the blocks of kept keys.

    The scores are raw, [K, G, T, C], and -inf where a row does not keep the key.

    Returns:
      the last carry, and the number of keys read for each kv head.
    """
    walk, count = kept.blocks()
    pages = kept.pages
    rows = q.astype(pages.operand_dtype)

    def block(i: Array, carry: Any) -> Any:
        column, valid = walk.block(i)
        scores = jnp.einsum(
            "kgtd,kcd->kgtc",
            rows,
            pages.gather(pages.k, column),
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(kept.rows(column, valid), scores, -jnp.inf)
        return visit(column, valid, scores, carry)

    return lax.fori_loop(0, -(-jnp.max(count) // BLOCK), block, start), count


def best_kept(q: Float[Array, "K G T D"], kept: Kept) -> Float[Array, "K G T"]:
    """The largest raw score among a row's kept keys; -inf for a row without any."""

    def visit(column: Array, valid: Array, scores: Array, best: Array) -> Array:
        del column, valid
        return jnp.maximum(best, jnp.max(scores, axis=-1))

    return _walk(q, kept, visit, jnp.full(q.shape[:-1], -jnp.inf))[0]


def lse_kept(q: Float[Array, "K G T D"], kept: Kept) -> Float[Array, "K G T"]:
    """Log of the sum of exp(score / sqrt(D)) over a row's kept keys; -inf for a row without any."""
    scale = q.shape[-1] ** -0.5

    def visit(column: Array, valid: Array, scores: Array, running: Running) -> Running:
        del column, valid
        return fold(running, scores, scale)

    return lse_of(_walk(q, kept, visit, start(q.shape[:-1]))[0], scale)


def attend_kept(
    q: Float[Array, "K G T D"], kept: Kept, floor: Float[Array, "K G T"] | None = None
) -> tuple[Partial, Int[Array, "K G T"], Int[Array, " K"]]:
    """Softmax attention over the kept keys whose raw score is at least `floor`.

    Returns:
      the partial attention, the keys that each row attends to, and the keys read for each kv head.
    """
    scale = q.shape[-1] ** -0.5
    rows = q.shape[:-1]

    def visit(column: Array, valid: Array, scores: Array, carry: Any) -> Any:
        running, attended = carry
        if floor is not None:
            scores = jnp.where(scores >= floor[..., None], scores, -jnp.inf)
        # The last block is filled up with arbitrary keys, whose pages may hold anything.
        v = jnp.where(valid[..., None], kept.pages.gather(kept.pages.v, column), 0)

        def weigh(p: Array) -> Array:
            return jnp.einsum(
                "kgtc,kcd->kgtd", p.astype(v.dtype), v, preferred_element_type=jnp.float32
            )

        attended += jnp.sum(scores > -jnp.inf, axis=-1, dtype=jnp.int32)
        return fold(running, scores, scale, weigh), attended

    none = start(rows, q.shape[-1]), jnp.zeros(rows, jnp.int32)
    (running, attended), read = _walk(q, kept, visit, none)
    return finish(running, scale), attended, read


def scores_listed(
    q: Float[Array, "K G T D"], kept: Kept, room: int
) -> tuple[Float[Array, "K G T M"], Int[Array, "K M"]]:
    """Raw scores and columns of the kept keys, in ascending order of columns.

    Args:
      q: query rows.
      kept: which keys.
      room: static; no kv head may have more keys than this that any of its rows keeps.

    Returns:
      the scores, -inf for keys that the row does not keep and for entries past the last key; and
      the columns.
    """
    room = -(-room // BLOCK) * BLOCK

    def visit(column: Array, valid: Array, scores: Array, carry: Any) -> Any:
        at, listed, columns = carry
        del valid
        listed = lax.dynamic_update_slice_in_dim(listed, scores, at, -1)
        columns = lax.dynamic_update_slice_in_dim(columns, column, at, -1)
        return at + BLOCK, listed, columns

    listed = jnp.full((*q.shape[:-1], room), -jnp.inf)
    columns = jnp.zeros((q.shape[0], room), jnp.int32)
    (_, listed, columns), _ = _walk(q, kept, visit, (jnp.int32(0), listed, columns))
    return listed, columns


def scores_at(
    q: Float[Array, "K G T D"], pages: Pages, column: Int[Array, "K G T C"]
) -> Float[Array, "K G T C"]:
    """Raw inner products of each row with the keys in the columns given for that row."""
    heads = q.shape[0]
    k = pages.gather(pages.k, column.reshape(heads, -1)).reshape(*column.shape, -1)
    return jnp.einsum("kgtd,kgtcd->kgtc", q.astype(k.dtype), k, preferred_element_type=jnp.float32)
