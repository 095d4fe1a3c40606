"""A graph over one layer's keys, searched for a query's critical keys in sublinear time.

RoarGraph (arXiv 2408.08933) as AlayaDB uses it (arXiv 2504.10326, sections 6.1.3 and 7): built from
queries of the prefill, because queries and keys are of different distributions and a graph of near
keys leads a query nowhere. One graph a kv head serves the G heads of its group. It covers a stored
context, `length` keys by their positions; tokens that come later belong to the window.

The answer is approximate: exact scores, of the keys that the walk came to. What it came to is a
subset of DIPR's answer, up to the best score known: all of it if every critical key can be reached
through critical keys (or through the first `l0`). Measured in benchmarks/graph_recall.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.cache.tiers import Tiers
from alaya_jax.cache.views import Pages
from alaya_jax.errors import ConfigError
from alaya_jax.index.found import Found, per_row, to_front
from alaya_jax.index.graph.search import Goal, Read, Terrain, search

_TOP_STARTS = 8
"""Where a search for the best k starts, of the layer's starts those that score best."""

_TOP_LISTED = 32
"""Keys that such a search may list, over those that it keeps in view."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How far a search goes. Static.

    Attributes:
      l0: the list's length up to which everything met is expanded.
      capacity: the most keys that a walk may list, C.
      shared: one walk for the G heads of a group, which reads a key once for all of them and goes
        on where any of them would; else each head walks alone, as in the paper.
      keep: how many of the best stay in view, of a search for those; None: all that are listed.
    """

    l0: int = 32
    capacity: int = 4096
    shared: bool = True
    keep: int | None = None


SHARED = Effort()
"""As plans ask by default."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GraphLayer:
    """The graph of one layer of one context.

    Attributes:
      neighbours: int32 [K, N, R], positions in the context; -1 where there is none. N is at least
        the context's length.
      starts: int32 [K, E], where searches start; -1 where there is none.
      length: int32 scalar, keys covered.
    """

    neighbours: Int[Array, "K N R"]
    starts: Int[Array, "K E"]
    length: Int[Array, ""]

    def search_range(
        self,
        q: Float[Array, "K G T D"],
        pages: Pages,
        limit: Int[Array, " T"],
        low: Int[Array, ""],
        beta: float | jax.Array,
        seed: Float[Array, "K G T"],
        effort: Effort = SHARED,
    ) -> Found:
        """DIPRS: keys that score at least `max(best found, seed) - beta`.

        Args:
          q: rotated (RoPE), unscaled queries.
          pages: where the keys are.
          limit: only positions below it are eligible, of each query token; at most `length` counts.
          low: only positions from here on are (what is before is attended anyway).
          beta: the range, a number, [H] or [K, G, T].
          seed: best raw score of the window, or -inf.
          effort: how far a walk goes, and how many walks there are. Static.

        Raises:
          ConfigError: K * N does not fit 32 bits, or a setting is not positive.
        """
        return self._each(q, pages, limit, low, per_row(beta, q), seed, effort)

    def search_top(
        self,
        q: Float[Array, "K G T D"],
        pages: Pages,
        limit: Int[Array, " T"],
        low: Int[Array, ""],
        k: int,
        ef: int | None = None,
        *,
        shared: bool = False,
    ) -> Found:
        """The best `k` keys of each query row, as far as the walk finds them, best first.

        Args:
          q, pages, limit, low: as in `search_range`.
          k: how many, the width of the answer. Static.
          ef: how many the walk keeps in view, at least `k`; more finds more. Default 2 k. Static.
          shared: see `Effort`.
        """
        ef = 2 * k if ef is None else ef
        if not 0 < k <= ef:
            raise ConfigError(
                f"search_top(k={k}, ef={ef}): ef must be at least k, and k at least 1"
            )
        beta = jnp.full(q.shape[:3], jnp.inf)
        seed = jnp.full(q.shape[:3], -jnp.inf)
        effort = Effort(ef, _TOP_LISTED * ef, shared, keep=ef)
        found = self._each(q, pages, limit, low, beta, seed, effort)
        scores, order = lax.top_k(found.scores, k)
        positions = jnp.take_along_axis(found.positions, order, axis=-1)
        return dataclasses.replace(found, positions=positions, scores=scores)

    def _each(
        self,
        q: Float[Array, "K G T D"],
        pages: Pages,
        limit: Int[Array, " T"],
        low: Int[Array, ""],
        beta: Float[Array, "K G T"],
        seed: Float[Array, "K G T"],
        effort: Effort,
    ) -> Found:
        """One query token after another: what a walk remembers is as large as the context."""
        heads, n, _ = self.neighbours.shape
        walks = heads if effort.shared else heads * q.shape[1]
        if walks * n >= 2**31 or min(effort.l0, effort.capacity) < 1:
            raise ConfigError(
                f"Graph(l0={effort.l0}, capacity={effort.capacity}) over {walks} walks and {n} "
                "keys: settings must be positive, and walks times keys below 2**31; split the "
                "context or the heads"
            )
        limit = jnp.minimum(jnp.broadcast_to(limit, q.shape[2:3]), self.length)

        def one(args: tuple[Array, Array, Array, Array]) -> Found:
            q, limit, beta, seed = args
            return self._walk(q, pages, limit, low, beta, seed, effort)

        if q.shape[2] == 1:
            found = one((q[:, :, 0], limit[0], beta[:, :, 0], seed[:, :, 0]))
            return jax.tree.map(lambda x: x[:, :, None], found)
        rows = (jnp.moveaxis(q, 2, 0), limit, jnp.moveaxis(beta, 2, 0), jnp.moveaxis(seed, 2, 0))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), lax.map(one, rows))

    def _walk(
        self,
        q: Float[Array, "K G D"],
        pages: Pages,
        limit: Int[Array, ""],
        low: Int[Array, ""],
        beta: Float[Array, "K G"],
        seed: Float[Array, "K G"],
        effort: Effort,
    ) -> Found:
        """One query token: fields without the axis T."""
        heads, group, dim = q.shape
        keep, capacity = effort.keep, effort.capacity
        walks = heads if effort.shared else heads * group
        rows = heads * group // walks  # of a walk
        dtype = pages.operand_dtype
        q = q.astype(dtype).reshape(walks, rows, dim)
        size = pages.k.shape[2]

        def read(head: Array, position: Array) -> Array:
            page = jnp.take(pages.ids, position // size, mode="clip")
            if isinstance(pages.k, Tiers):
                return pages.k.tokens(head, page, position % size).astype(dtype)
            return pages.k[head, page, position % size].astype(dtype)

        starts = self._starts(q, read, low, limit, walks)
        if keep is not None:
            # Nothing bars what is met before `keep` are listed: the fewer, the nearer to the best.
            starts = starts[:, :_TOP_STARTS]
        terrain = Terrain(self.neighbours, starts, read, low, limit)
        beta, seed = beta.reshape(walks, rows), seed.reshape(walks, rows)
        walked = search(q, seed, terrain, Goal(beta, effort.l0, keep, capacity))
        scores = jnp.moveaxis(walked.scores, 1, 2).reshape(heads * group, capacity)
        positions = jnp.repeat(walked.positions, rows, axis=0)
        bar = (walked.best - beta).reshape(-1, 1)
        positions, scores = to_front((scores >= bar) & (scores > -jnp.inf), positions, scores)

        def of_row(x: Array) -> Array:
            return jnp.repeat(x, rows, axis=0).reshape(heads, group)

        return Found(
            positions.reshape(heads, group, capacity),
            scores.reshape(heads, group, capacity),
            of_row(walked.visited),
            of_row(walked.overflow),
            self._met(walked.met, terrain, pages) if isinstance(pages.k, Tiers) else None,
        )

    def _met(self, met: Bool[Array, "W n"], terrain: Terrain, pages: Pages) -> Array:
        """Pages whose keys the walks read, bool [K, N]; the starts too, also those not gone on
        from.
        """
        heads, n, _ = self.neighbours.shape
        keys = met.reshape(heads, -1, n).any(axis=1) & terrain.eligible(jnp.arange(n))
        keys = keys[:, : pages.columns]
        keys = jnp.pad(keys, ((0, 0), (0, pages.columns - keys.shape[1])))
        in_pages = keys.reshape(heads, -1, pages.size).any(axis=-1)
        first = jnp.minimum(terrain.low, n - 1)
        starts = jnp.where(terrain.eligible(self.starts), self.starts, first) // pages.size
        in_pages = in_pages.at[:, first // pages.size].set(True)
        return in_pages.at[jnp.arange(heads)[:, None], starts].set(True)

    def _starts(self, q: Array, read: Read, low: Array, limit: Array, walks: int) -> Array:
        """Start nodes of each walk [W, E + 1], best first; the first eligible key is one."""
        heads = self.starts.shape[0]
        first = jnp.minimum(low, self.neighbours.shape[1] - 1).astype(jnp.int32)
        starts = jnp.concatenate([self.starts, jnp.broadcast_to(first, (heads, 1))], axis=1)
        usable = (starts >= low) & (starts < limit)
        head = jnp.broadcast_to(jnp.arange(heads)[:, None], starts.shape)
        keys = read(head, jnp.where(usable, starts, first))  # [K, E + 1, D]
        per_head = q.reshape(heads, -1, *q.shape[1:])
        scores = jnp.einsum("kwgd,ked->kweg", per_head, keys, preferred_element_type=jnp.float32)
        best = jnp.where(usable[:, None], jnp.max(scores, axis=-1), -jnp.inf)
        order = jnp.argsort(-best, axis=-1).reshape(walks, -1)
        return jnp.take_along_axis(jnp.repeat(starts, walks // heads, axis=0), order, axis=1)
