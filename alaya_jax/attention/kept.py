"""Attention over the few keys that a selection kept, at a cost that follows how many there are.

Kept keys are counted off by prefix sums over pages and read in blocks, each once for all queries of
its kv head. The loops run as many blocks as are filled: no buffer could overflow.
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
"""Keys read at once, of each kv head."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which keys, or whole pages, each query row wants.

    Attributes:
      pages: of the sequence.
      keys: positions that a row may see; of a page that is kept, only those count.
      mask: bool [K, G, T, S] by key, or [K, G, T, N] by page.
      by_page: which of the two.
    """

    pages: Pages
    keys: KeyRange
    mask: Bool[Array, "K G T M"]
    by_page: bool = False

    def blocks(self) -> tuple["Walk", Int[Array, " K"]]:
        """Blocks of the keys that any row of a kv head wants, and how many keys that are."""
        wanted = jnp.any(self.mask, axis=(1, 2))
        size = self.pages.size
        if self.by_page:
            slots = jnp.broadcast_to(wanted[..., None], (*wanted.shape, size))
        else:
            slots = wanted.reshape(wanted.shape[0], -1, size)
        ends = jnp.cumsum(jnp.sum(slots, axis=-1, dtype=jnp.int32), axis=-1)
        return Walk(slots, ends), ends[:, -1]

    def rows(self, column: Int[Array, "K C"], valid: Bool[Array, "K C"]) -> Bool[Array, "K G T C"]:
        """Which rows want the keys in these columns."""
        at = column // self.pages.size if self.by_page else column
        at = jnp.minimum(at, self.mask.shape[-1] - 1)
        chosen = jax.vmap(lambda mask, i: mask[..., i])(self.mask, at)
        chosen &= valid[:, None, None]
        if self.by_page:
            chosen &= self.keys.mask(self.pages.position_of(column))[:, None]
        return chosen


@dataclasses.dataclass(frozen=True)
class Walk:
    """The wanted keys of each kv head, by rank.

    Attributes:
      slots: bool [K, N, Z], wanted.
      ends: int32 [K, N], wanted keys up to and with each page.
    """

    slots: Bool[Array, "K N Z"]
    ends: Int[Array, "K N"]

    def block(self, i: Array) -> tuple[Int[Array, "K C"], Bool[Array, "K C"]]:
        """Columns of the wanted keys from rank i * BLOCK on, and which of them there are."""
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
    """Folds `visit(columns, valid, raw scores (-inf: not wanted) [K, G, T, C], carry)`."""
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
    """The largest raw score of a row's kept keys, -inf where there is none."""

    def visit(column: Array, valid: Array, scores: Array, best: Array) -> Array:
        del column, valid
        return jnp.maximum(best, jnp.max(scores, axis=-1))

    return _walk(q, kept, visit, jnp.full(q.shape[:-1], -jnp.inf))[0]


def lse_kept(q: Float[Array, "K G T D"], kept: Kept) -> Float[Array, "K G T"]:
    """Log of the sum of exp(score / sqrt(D)) over a row's kept keys, -inf where there is none."""
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
      the partial attention; keys attended to by each row; keys read for each kv head.
    """
    scale = q.shape[-1] ** -0.5
    rows = q.shape[:-1]

    def visit(column: Array, valid: Array, scores: Array, carry: Any) -> Any:
        running, attended = carry
        if floor is not None:
            scores = jnp.where(scores >= floor[..., None], scores, -jnp.inf)
        # A block past the last key repeats any key, whose page may hold anything.
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
    """Raw scores of the kept keys and their columns, ascending.

    Args:
      room: of these keys, any row's, of one kv head; there must not be more. Static.

    Returns:
      scores, -inf for keys that the row does not want and where there is none; columns.
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
    """Raw inner products of each row with the keys in its own columns."""
    heads = q.shape[0]
    k = pages.gather(pages.k, column.reshape(heads, -1)).reshape(*column.shape, -1)
    return jnp.einsum("kgtd,kgtcd->kgtc", q.astype(k.dtype), k, preferred_element_type=jnp.float32)
