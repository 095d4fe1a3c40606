"""Clusters of one layer's keys: few centroids are scored, and the keys of clusters in question.

Segmented spherical k-means, one kv head at a time, as RetroInfer has it (arXiv 2505.02922): in
segments of 8,192 tokens, about 16 keys a cluster, centroids started at equal strides, nine rounds
of assigning each key to the centroid of largest cosine. A cluster then has its members' mean c, the
largest distance r of a member from it, and the root of the mean square of those distances, d.

For a query q a member scores q.c + q.(k - c). With `z=None` a cluster is read iff
q.c + |q| r >= best - beta, where best is a score that some eligible key or the window attains. By
Cauchy and Schwarz no key that scores best - beta or more is in another cluster: DIPR's answer is
complete, and on real keys nearly all clusters are read. With a number z, a cluster is read iff
q.c + z |q| d / sqrt(D) >= best - beta: members in directions at random around c would score within
z standard deviations. Keys are not at random, so that promises nothing; benchmarks/graph_recall.py
measures it.

What is found is scored exactly. The centroids are a sixteenth of the keys, and all of them are
scored: cost is not sublinear, as that of the graph is, but it is sequential.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alaya_jax.attention.paged import Pages
from alaya_jax.errors import ConfigError
from alaya_jax.index.found import Found, per_row, to_front

SEGMENT = 8192
"""Tokens clustered together."""

ROUNDS = 9

_TILE = 512  # keys read at once, of each kv head
_PROBE = 32  # keys of the best cluster that are read first
_EPSILON = 2.0**-18  # of |q| |k|: what float32 sums may differ by


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClusterLayer:
    """The clusters of one layer of one context.

    Attributes:
      centroids: float32 [K, M, D], means.
      spread, radius: float32 [K, M], d and r above.
      members: int32 [K, N], positions, cluster by cluster, ascending in each.
      first: int32 [K, M + 1], where each cluster begins among the members.
      length: int32 scalar, keys covered.
    """

    centroids: Float[Array, "K M D"]
    spread: Float[Array, "K M"]
    radius: Float[Array, "K M"]
    members: Int[Array, "K N"]
    first: Int[Array, "K M+1"]
    length: Int[Array, ""]

    def search_range(
        self,
        q: Float[Array, "K G T D"],
        pages: Pages,
        limit: Int[Array, " T"],
        low: int | Int[Array, ""],
        beta: float | jax.Array,
        seed: Float[Array, "K G T"],
        *,
        z: float | None = 3.0,
        capacity: int = 4096,
    ) -> Found:
        """DIPR: keys that score at least `max(best found, seed) - beta`.

        A cluster that one head of a group wants is read for all of them.

        Args:
          q, pages, limit, low, beta, seed, capacity: as in `GraphLayer.search_range`.
          z: see above; None for the complete answer. Static.
        """
        if capacity < 1:
            raise ConfigError(f"Cluster(capacity={capacity}): must be at least 1")
        limit = jnp.minimum(jnp.broadcast_to(limit, q.shape[2:3]), self.length)
        beta = per_row(beta, q)

        def one(args: tuple[Array, Array, Array, Array]) -> Found:
            q, limit, beta, seed = args
            return self._search(q, pages, limit, low, beta, seed, z, capacity)

        rows = (jnp.moveaxis(q, 2, 0), limit, jnp.moveaxis(beta, 2, 0), jnp.moveaxis(seed, 2, 0))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), lax.map(one, rows))

    def _search(
        self,
        q: Float[Array, "K G D"],
        pages: Pages,
        limit: Int[Array, ""],
        low: int | Int[Array, ""],
        beta: Float[Array, "K G"],
        seed: Float[Array, "K G"],
        z: float | None,
        capacity: int,
    ) -> Found:
        """One query token: fields without the axis T."""
        heads, group, dim = q.shape
        dtype = pages.operand_dtype
        q = q.astype(dtype).astype(jnp.float32)
        begin, size = self.first[:, :-1], jnp.diff(self.first)
        ends = (begin, jnp.maximum(self.first[:, 1:] - 1, 0))
        lowest, highest = (jnp.take_along_axis(self.members, end, axis=1) for end in ends)
        open_ = (size > 0) & (highest >= low) & (lowest < limit)  # [K, M]
        score = jnp.einsum("kgd,kmd->kgm", q, self.centroids, precision=lax.Precision.HIGHEST)
        score = jnp.where(open_[:, None], score, -jnp.inf)

        def read(index: Array, valid: Array) -> tuple[Array, Array, Array]:
            """Positions, validity and keys [K, S, D] of members by index [K, S]."""
            position = jnp.take_along_axis(self.members, index, axis=1, mode="clip")
            valid &= (position >= low) & (position < limit)
            page = jnp.take(pages.ids, position // pages.k.shape[2], mode="clip")
            slot = position % pages.k.shape[2]
            keys = jax.vmap(lambda pool, p, s: pool[p, s])(pages.k, page, slot)
            return position, valid, keys.astype(dtype)

        # A score that is attained: the best of the best cluster.
        top = jnp.min(
            jnp.where(
                score == jnp.max(score, -1, keepdims=True), jnp.arange(score.shape[-1]), 2**30
            ),
            axis=-1,
        )  # [K, G]
        probe = jnp.arange(_PROBE)
        index = jnp.take_along_axis(begin, top, axis=1)[..., None] + probe
        inside = probe < jnp.take_along_axis(size, top, axis=1)[..., None]
        _, inside, keys = read(index.reshape(heads, -1), inside.reshape(heads, -1))
        keys = keys.reshape(heads, group, _PROBE, dim)
        probed = jnp.einsum("kgd,kgpd->kgp", q.astype(dtype), keys).astype(jnp.float32)
        probed = jnp.where(inside.reshape(probed.shape), probed, -jnp.inf)
        best = jnp.maximum(seed.astype(jnp.float32), jnp.max(probed, axis=-1))

        norm = jnp.linalg.norm(q, axis=-1)[..., None]
        if z is None:
            length = jnp.linalg.norm(self.centroids, axis=-1) + self.radius
            slack = norm * (self.radius + _EPSILON * length)[:, None]
        else:
            slack = norm * z / dim**0.5 * self.spread[:, None]
        wanted = score + slack >= (best - beta)[..., None]
        wanted |= jnp.arange(score.shape[-1]) == top[..., None]  # what was probed is found too
        wanted &= score > -jnp.inf
        taken = jnp.where(jnp.any(wanted, axis=1), size, 0)
        upto = jnp.cumsum(taken, axis=1)  # [K, M]
        rows = heads * group
        row = jnp.arange(rows)[:, None]

        def tile(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            positions, scores, count, best, visited = carry
            slot = i * _TILE + jnp.arange(_TILE)
            which = jax.vmap(lambda u: jnp.searchsorted(u, slot, side="right"))(upto)
            which = jnp.minimum(which, size.shape[1] - 1)
            at = slot - jnp.take_along_axis(upto - taken, which, axis=1)
            index = jnp.take_along_axis(begin, which, axis=1) + at
            position, valid, keys = read(index, slot < upto[:, -1:])
            new = jnp.einsum(
                "kgd,ksd->kgs", q.astype(dtype), keys, preferred_element_type=jnp.float32
            )
            new = jnp.where(valid[:, None], new, -jnp.inf)
            best = jnp.maximum(best, jnp.max(new, axis=-1))
            listed = (new >= (best - beta)[..., None]) & valid[:, None]
            listed = listed.reshape(rows, _TILE)
            place = count[:, None] + jnp.cumsum(listed, axis=1, dtype=jnp.int32) - 1
            place = jnp.where(listed, place, capacity)
            position = jnp.repeat(position, group, axis=0)
            return (
                positions.at[row, place].set(position, mode="drop"),
                scores.at[row, place].set(new.reshape(rows, _TILE), mode="drop"),
                count + jnp.sum(listed, axis=1, dtype=jnp.int32),
                best,
                visited + jnp.sum(valid, axis=1, dtype=jnp.int32),
            )

        start = (
            jnp.zeros((rows, capacity), jnp.int32),
            jnp.full((rows, capacity), -jnp.inf),
            jnp.zeros(rows, jnp.int32),
            best,
            jnp.sum(open_, axis=1, dtype=jnp.int32),
        )
        tiles = -(-jnp.max(upto[:, -1]) // _TILE)
        positions, scores, count, best, visited = lax.fori_loop(0, tiles, tile, start)
        bar = (best - beta).reshape(rows, 1)
        positions, scores = to_front((scores >= bar) & (scores > -jnp.inf), positions, scores)
        return Found(
            positions.reshape(heads, group, capacity),
            scores.reshape(heads, group, capacity),
            jnp.broadcast_to(visited[:, None], (heads, group)),
            (count > capacity).reshape(heads, group),
        )


def build(
    keys: Float[Array, "K N D"],
    length: int,
    *,
    cluster_size: int = 16,
    on_block: Callable[[int, int], None] | None = None,
) -> ClusterLayer:
    """The clusters of one layer of one context.

    Args:
      keys: after RoPE; what is past `length` is not looked at.
      length: keys of the context.
      cluster_size: keys a cluster, on average.
      on_block: called with segments done and segments in all.
    """
    if cluster_size < 1 or length < 1:
        raise ConfigError(f"clusters of {cluster_size} keys over {length}: both must be positive")
    heads, n, _ = keys.shape
    segment = min(SEGMENT, n)
    starts = range(0, length, segment)
    count = max(1, segment // cluster_size)
    parts = []
    for i, start in enumerate(starts):
        block = keys[:, start : start + segment]
        block = jnp.pad(block, ((0, 0), (0, segment - block.shape[1]), (0, 0)))
        filled = jnp.asarray(min(segment, length - start))
        parts.append(
            jax.tree.map(
                lambda *x: jnp.stack(x), *[_segment(block[h], filled, count) for h in range(heads)]
            )
        )
        if on_block is not None:
            jax.block_until_ready(parts[-1])
            on_block(i + 1, len(starts))
    centroids, spread, radius, members, first = (
        [part[i] for part in parts] for i in range(5)
    )  # a list over segments each
    members = jnp.concatenate([start + m for start, m in zip(starts, members, strict=True)], axis=1)
    first = [start + f[:, :-1] for start, f in zip(starts, first, strict=True)]
    end = jnp.full((heads, 1), length, jnp.int32)
    return ClusterLayer(
        jnp.concatenate(centroids, axis=1),
        jnp.concatenate(spread, axis=1),
        jnp.concatenate(radius, axis=1),
        members.astype(jnp.int32),
        jnp.concatenate([*first, end], axis=1).astype(jnp.int32),
        jnp.asarray(length, jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="count")
def _segment(
    keys: Float[Array, "S D"], filled: Int[Array, ""], count: int
) -> tuple[Array, Array, Array, Array, Array]:
    """k-means of one segment: centroids, spread, radius, members in order, where each begins."""
    size = keys.shape[0]
    valid = jnp.arange(size) < filled
    x = jnp.where(valid[:, None], keys.astype(jnp.float32), 0.0)

    def assign(centroids: Array) -> Array:
        length = jnp.linalg.norm(centroids, axis=-1, keepdims=True)
        score = x @ (centroids / jnp.where(length > 0, length, 1.0)).T
        top = jnp.max(score, axis=-1, keepdims=True)
        nearest = jnp.min(jnp.where(score == top, jnp.arange(count), count - 1), axis=-1)
        return jnp.where(valid, nearest, count)

    def means(nearest: Array, before: Array) -> tuple[Array, Array]:
        total = jnp.zeros_like(before).at[nearest].add(x, mode="drop")
        held = jnp.zeros(count).at[nearest].add(1.0, mode="drop")
        return jnp.where(held[:, None] > 0, total / jnp.maximum(held, 1)[:, None], before), held

    start = x[(jnp.arange(count) * filled) // count]
    centroids = lax.fori_loop(0, ROUNDS, lambda _, c: means(assign(c), c)[0], start)
    nearest = assign(centroids)
    centroids, held = means(nearest, centroids)
    square = jnp.sum((x - centroids[jnp.minimum(nearest, count - 1)]) ** 2, axis=-1)
    radius = jnp.sqrt(jnp.zeros(count).at[nearest].max(square, mode="drop"))
    total = jnp.zeros(count).at[nearest].add(square, mode="drop")
    order = jnp.argsort(nearest, stable=True)
    first = jnp.searchsorted(nearest[order], jnp.arange(count + 1))
    return centroids, jnp.sqrt(total / jnp.maximum(held, 1)), radius, order, first
