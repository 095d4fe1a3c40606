"""Walks over the graph of one layer's keys: DIPRS and best-first search, many at once.

A walk is a search in the graph of one kv head. It serves one query row, or the rows of all heads
of a group at once: then a key is read once for all of them, and goes on the list when any of them
wants it. All walks share one loop. Its state holds one queue of (walk, node) pairs; an iteration
takes a block of them whosever they are, so a walk that has ended costs nothing and one that has
much to do gets the whole block.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

BLOCK = 256
"""Nodes expanded in an iteration, of all walks together."""

TILE = 1024
"""Keys read and scored at once."""

FIRST_HOP = 8
"""Neighbours of a node, the first of its list, that are passed through if they are not eligible."""

SECOND_HOP = 4
"""Neighbours tried, the first of its list, of a node that is passed through."""

Read = Callable[[Array, Array], Array]
"""(kv head [N], position [N]) -> keys [N, D]."""


@dataclasses.dataclass(frozen=True)
class Terrain:
    """What is the same for all walks.

    Attributes:
      neighbours: int32 [K, N, R]; -1 where there is none.
      starts: int32 [W, E], start nodes of each walk, best first; -1 where there is none.
      read: reads keys.
      low, limit: int32 scalars, positions `low <= j < limit` are eligible.
    """

    neighbours: Int[Array, "K N R"]
    starts: Int[Array, "W E"]
    read: Read
    low: Array
    limit: Array

    def eligible(self, position: Array) -> Array:
        """bool, of any shape."""
        return (position >= self.low) & (position < self.limit)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The lists C of W walks, for rows of G queries each.

    Attributes:
      turn: iterations done.
      seen: int16 or int32 [W * N], the mark that a node got when it was met, or the largest number.
      queue: int32, nodes (walk * N + position) to expand, between `head` and `tail`; the
        complement of a node that is only passed through. `slots` says where each is listed.
      count: int32 [W], lengths of the lists.
      positions, scores: [W * C], [W * C, G], the lists.
      best: float32 [W, G], best score so far, the seed included.
      bar: float32 [W, G], score below which nothing is wanted, whatever beta says.
      visited: int32 [W], keys scored.
      overflow: bool [W].
    """

    turn: Array
    seen: Int[Array, " W*N"]
    queue: Int[Array, " queue"]
    slots: Int[Array, " queue"]
    head: Array
    tail: Array
    count: Int[Array, " W"]
    positions: Int[Array, " W*C"]
    scores: Float[Array, "W*C G"]
    best: Float[Array, "W G"]
    bar: Float[Array, "W G"]
    visited: Int[Array, " W"]
    overflow: Bool[Array, " W"]


@dataclasses.dataclass(frozen=True)
class Walked:
    """Where the walks came to.

    Attributes:
      positions: int32 [W, C]; scores: float32 [W, C, G], -inf past a list's end.
      best: float32 [W, G], best score met, or the seed.
      visited: int32 [W], keys scored.
      overflow: bool [W], the list of C was full, or the queue.
    """

    positions: Int[Array, "W C"]
    scores: Float[Array, "W C G"]
    best: Float[Array, "W G"]
    visited: Int[Array, " W"]
    overflow: Bool[Array, " W"]


@dataclasses.dataclass(frozen=True)
class Goal:
    """What goes on the list.

    Attributes:
      beta: float32 [W, G], the range; infinite for the best alone.
      l0: the list takes everything until it is longer than this.
      keep: None, or how many of the best are wanted: what scores below that many others is neither
        listed nor expanded.
      capacity: the most that a list holds.
    """

    beta: Float[Array, "W G"]
    l0: int
    keep: int | None
    capacity: int


def search(
    q: Float[Array, "W G D"], seed: Float[Array, "W G"], terrain: Terrain, goal: Goal
) -> Walked:
    """AlayaDB's Algorithm 1 (arXiv 2504.10326, section 6.1.3), a block of the list at a time.

    A list C starts with the start nodes and is only appended to. Its nodes are expanded in order;
    an unvisited neighbour goes on the list iff |C| <= l0 or it scores within `beta` of the best so
    far. That best includes the seed, and here all keys that are scored at the same time: it can
    be higher than in a loop over single keys, never above the final one, so a key that is turned
    down is not in the answer either way.

    A neighbour that is not eligible is not scored; its key need not be in the session's pages. It
    is passed through: its own neighbours are tried, those of them that are not eligible are left
    (section 7.1: neighbours and their neighbours). The second hop is taken where the first one
    fails, and both along the edges that most queries asked for: `FIRST_HOP`, `SECOND_HOP`.

    With `keep`, the same walk finds the best `keep` of each row: the bar is then the score of the
    worst of the best `keep` on the list. It only rises, too.
    """
    walks, group, _ = q.shape
    capacity = goal.capacity
    heads, n, degree = terrain.neighbours.shape
    per_head = walks // heads
    width = BLOCK * degree
    walk = jnp.repeat(jnp.arange(walks), terrain.starts.shape[1])
    starts = jnp.where(terrain.starts.ravel() < 0, -1, walk * n + terrain.starts.ravel())
    starts = jnp.pad(starts, (0, -starts.shape[0] % width), constant_values=-1)
    start_turns = starts.shape[0] // width
    # What was met is marked; marks are small numbers where they may be, since the marks are many.
    mark_dtype = jnp.int16 if width < jnp.iinfo(jnp.int16).max else jnp.int32
    unseen = jnp.iinfo(mark_dtype).max
    room = 2 * walks * capacity  # of the queue: as many to pass through as are listed

    def met_from_queue(state: _State) -> tuple[Array, Array]:
        nodes = lax.dynamic_slice_in_dim(state.queue, state.head, BLOCK)
        waiting = jnp.arange(BLOCK) < state.tail - state.head
        # A walk's nodes together, in the order they were listed in.
        walk = jnp.where(waiting, jnp.where(nodes < 0, ~nodes, nodes) // n, walks)
        walk, order = lax.sort((walk, jnp.arange(BLOCK)), num_keys=1)
        waiting, nodes = waiting[order], nodes[order]
        passing = nodes < 0
        position = jnp.where(passing, ~nodes, nodes) % n
        near = terrain.neighbours[walk // per_head, position]  # [BLOCK, R]
        there = (near >= 0) & waiting[:, None]
        if goal.keep is not None:
            slots = lax.dynamic_slice_in_dim(state.slots, state.head, BLOCK)[order]
            above = jnp.any(state.scores[slots] >= state.bar[walk], axis=-1)
            there &= (passing | above)[:, None]
        # What is met while passing through must be eligible itself.
        eligible, place = terrain.eligible(near), jnp.arange(degree)
        there &= jnp.where(
            passing[:, None], eligible & (place < SECOND_HOP), eligible | (place < FIRST_HOP)
        )
        return jnp.where(there, walk[:, None] * n + near, -1).ravel(), there.ravel()

    def turn(state: _State) -> _State:
        met, there = met_from_queue(state)
        if start_turns:
            at = jnp.minimum(state.turn, start_turns - 1) * width
            first = lax.dynamic_slice_in_dim(starts, at, width)
            starting = state.turn < start_turns
            met = jnp.where(starting, first, met)
            there = met >= 0
        else:
            starting = jnp.bool_(False)
        # Each node once: the first to leave its mark has it.
        mark = jnp.arange(width, dtype=mark_dtype)
        new = there & (state.seen[jnp.maximum(met, 0)] == unseen)
        seen = state.seen.at[jnp.where(new, met, walks * n)].min(mark, mode="drop")
        new &= seen[jnp.maximum(met, 0)] == mark
        eligible = terrain.eligible(met % n)
        head = state.head + jnp.where(starting, 0, jnp.minimum(BLOCK, state.tail - state.head))
        state = dataclasses.replace(state, turn=state.turn + 1, seen=seen, head=head)
        state = _enqueue(state, ~met, jnp.zeros_like(met), new & ~eligible, met // n, room)
        state = _try_append(q, terrain, goal, met, new & eligible, state, room)
        if goal.keep is None:
            return state
        listed = jnp.moveaxis(state.scores.reshape(walks, capacity, group), 1, 2)
        best, _ = lax.top_k(listed, goal.keep)
        return dataclasses.replace(state, bar=best[..., -1])

    def unfinished(state: _State) -> Array:
        return (state.turn < start_turns) | (state.head < state.tail)

    zero = jnp.int32(0)
    start = _State(
        turn=zero,
        seen=jnp.full(walks * n, unseen, mark_dtype),
        queue=jnp.zeros(room + BLOCK, jnp.int32),
        slots=jnp.zeros(room + BLOCK, jnp.int32),
        head=zero,
        tail=zero,
        count=jnp.zeros(walks, jnp.int32),
        positions=jnp.zeros(walks * capacity, jnp.int32),
        scores=jnp.full((walks * capacity, group), -jnp.inf),
        best=seed.astype(jnp.float32),
        bar=jnp.full((walks, group), -jnp.inf),
        visited=jnp.zeros(walks, jnp.int32),
        overflow=jnp.zeros(walks, bool),
    )
    end = lax.while_loop(unfinished, turn, start)
    return Walked(
        end.positions.reshape(walks, capacity),
        end.scores.reshape(walks, capacity, group),
        end.best,
        end.visited,
        end.overflow,
    )


def _enqueue(
    state: _State, nodes: Array, slots: Array, wanted: Array, walk: Array, room: int
) -> _State:
    """Appends the wanted nodes to the queue; a walk whose node does not fit overflows."""
    place = state.tail + jnp.cumsum(wanted, dtype=jnp.int32) - 1
    fits = wanted & (place < room)
    at = jnp.where(fits, place, state.queue.shape[0])
    lost = jnp.where(wanted & ~fits, walk, state.overflow.shape[0])
    return dataclasses.replace(
        state,
        queue=state.queue.at[at].set(nodes, mode="drop"),
        slots=state.slots.at[at].set(slots, mode="drop"),
        tail=state.tail + jnp.sum(fits, dtype=jnp.int32),
        overflow=state.overflow.at[lost].set(True, mode="drop"),
    )


def _try_append(
    q: Float[Array, "W G D"],
    terrain: Terrain,
    goal: Goal,
    met: Int[Array, " M"],
    new: Bool[Array, " M"],
    state: _State,
    room: int,
) -> _State:
    """`tryAppend` for the nodes that are new, tile by tile."""
    walks, capacity = q.shape[0], goal.capacity
    heads, n, _ = terrain.neighbours.shape
    total = jnp.sum(new, dtype=jnp.int32)
    place = jnp.where(new, jnp.cumsum(new, dtype=jnp.int32) - 1, met.shape[0])
    packed = jnp.zeros(-(-met.shape[0] // TILE) * TILE, jnp.int32).at[place].set(met, mode="drop")

    def tile(i: Array, state: _State) -> _State:
        nodes = lax.dynamic_slice_in_dim(packed, i * TILE, TILE)
        index = jnp.arange(TILE)
        valid = i * TILE + index < total
        walk, position = nodes // n, nodes % n
        keys = terrain.read(walk // (walks // heads), position)
        scores = jnp.einsum("md,mgd->mg", keys, q[walk], preferred_element_type=jnp.float32)
        scores = jnp.where(valid[:, None], scores, -jnp.inf)
        best = state.best.at[walk].max(scores)
        # A walk's keys stand together, from `begin` of it to that of the next.
        begin = jnp.searchsorted(jnp.where(valid, walk, walks), jnp.arange(walks + 1))
        before = begin[walk]
        # Up to l0 all are appended; so have those been that are ahead of it in this tile.
        listed = state.count[walk] + index - before
        bar = jnp.maximum(best - goal.beta, state.bar)
        close = jnp.any(scores >= bar[walk], axis=-1)
        append = valid & ((listed <= goal.l0) | close)
        upto = jnp.pad(jnp.cumsum(append, dtype=jnp.int32), (1, 0))
        place = state.count[walk] + upto[index] - upto[before]
        fits = append & (place < capacity)
        at = walk * capacity + place
        state = _enqueue(state, nodes, at, fits, walk, room)
        at = jnp.where(fits, at, walks * capacity)
        count = state.count + jnp.diff(upto[begin])
        return dataclasses.replace(
            state,
            count=jnp.minimum(count, capacity),
            positions=state.positions.at[at].set(position, mode="drop"),
            scores=state.scores.at[at].set(scores, mode="drop"),
            best=best,
            visited=state.visited + jnp.diff(begin),
            overflow=state.overflow | (count > capacity),
        )

    return lax.fori_loop(0, -(-total // TILE), tile, state)
