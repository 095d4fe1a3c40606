"""Walks over the graph of one layer's keys: DIPRS and best-first search, many at once.

A walk is a search in the graph of one kv head. It serves one query row, or the rows of all heads
of a group at once: then a key is read once for all of them, and goes on the list when any of them
wants it. All walks share one loop. Its state holds a queue of what is listed and one of what is
only passed through; an iteration takes a block of either, whosever it is, so a walk that has ended
costs nothing and one that has much to do gets the whole block.
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

SECOND_HOP = 4
"""Neighbours tried, the first of its list, of a node that is passed through: a block holds so many
more of these that it comes to as many neighbours."""

PASSED = 4
"""Nodes that may be passed through over those that may be listed, by all walks together."""

RANKED = 8
"""The best `keep` are ranked anew whenever the lists have grown by this part of their lengths."""

MARK = jnp.int16
"""What a walk remembers of each key: when it was met, within the last block (larger ones than are
used here take int32)."""

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
class _Queue:
    """What waits, between `head` and `tail`; nothing leaves the array."""

    items: Int[Array, " room"]
    head: Array
    tail: Array

    @classmethod
    def create(cls, room: int, block: int) -> "_Queue":
        """Empty, with room for so many; taken by blocks."""
        return cls(jnp.zeros(room + block, jnp.int32), jnp.int32(0), jnp.int32(0))

    @property
    def waiting(self) -> Array:
        return self.tail - self.head

    def next(self, block: int) -> tuple[Array, Array]:
        """The next items, and which of them there are."""
        items = lax.dynamic_slice_in_dim(self.items, self.head, block)
        return items, jnp.arange(block) < self.waiting

    def past(self, block: int | Array) -> "_Queue":
        """Without the next items."""
        return dataclasses.replace(self, head=jnp.minimum(self.head + block, self.tail))

    def add(self, items: Array, wanted: Array, room: int) -> tuple["_Queue", Array]:
        """With those that are wanted at its end; and which of these found no room."""
        place = self.tail + jnp.cumsum(wanted, dtype=jnp.int32) - 1
        fits = wanted & (place < room)
        at = jnp.where(fits, place, self.items.shape[0])
        tail = self.tail + jnp.sum(fits, dtype=jnp.int32)
        return _Queue(self.items.at[at].set(items, mode="drop"), self.head, tail), wanted & ~fits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The lists C of W walks, for rows of G queries each.

    Attributes:
      turn: iterations done.
      seen: int16 or int32 [W * N], the mark that a node got when it was met, or the largest number.
      listed: what is to be expanded, as places in the lists (walk * C + place).
      passed: what is to be passed through, as nodes (walk * N + position).
      count: int32 [W], lengths of the lists.
      positions, scores: [W * C], [W * C, G], the lists.
      best: float32 [W, G], best score so far, the seed included.
      bar: float32 [W, G], score below which nothing is wanted, whatever beta says.
      ranked: how long the lists were, all together, when the bar was last found out.
      visited: int32 [W], keys scored.
      overflow: bool [W].
    """

    turn: Array
    seen: Int[Array, " W*N"]
    listed: "_Queue"
    passed: "_Queue"
    count: Int[Array, " W"]
    positions: Int[Array, " W*C"]
    scores: Float[Array, "W*C G"]
    best: Float[Array, "W G"]
    bar: Float[Array, "W G"]
    ranked: Array
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
      met: bool [W, N], nodes that the walk came to: those that are eligible were read.
    """

    positions: Int[Array, "W C"]
    scores: Float[Array, "W C G"]
    best: Float[Array, "W G"]
    visited: Int[Array, " W"]
    overflow: Bool[Array, " W"]
    met: Bool[Array, "W N"]


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
    fails, and along the edges that most queries asked for: `SECOND_HOP`.

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
    mark_dtype = MARK if width < jnp.iinfo(MARK).max else jnp.int32
    unseen = jnp.iinfo(mark_dtype).max
    blocks = BLOCK, width // min(SECOND_HOP, degree)  # listed, passed
    room = walks * min(n, PASSED * capacity)

    def near(walk: Array, position: Array, hops: int) -> tuple[Array, Array, Array]:
        """The first neighbours of a block of nodes [block, hops], those of a walk together; whether
        there is one, and where each node of the block was. A walk past the last is none.
        """
        walk, order = lax.sort((walk, jnp.arange(walk.shape[0])), num_keys=1)
        near = terrain.neighbours[walk // per_head, position[order], :hops]
        there = (near >= 0) & (walk < walks)[:, None]
        return walk[:, None] * n + near, there, order

    def beside_listed(state: _State) -> Array:
        slots, waiting = state.listed.next(blocks[0])
        walk = jnp.where(waiting, slots // capacity, walks)
        nodes, there, order = near(walk, state.positions[slots], degree)
        if goal.keep is not None:
            above = jnp.any(state.scores[slots] >= state.bar[slots // capacity], axis=-1)
            there &= above[order, None]
        return jnp.where(there, nodes, -1).ravel()

    def beside_passed(state: _State) -> Array:
        nodes, waiting = state.passed.next(blocks[1])
        walk = jnp.where(waiting, nodes // n, walks)
        nodes, there, _ = near(walk, nodes % n, SECOND_HOP)
        # What is met while passing through must be eligible itself.
        met = jnp.where(there & terrain.eligible(nodes % n), nodes, -1).ravel()
        return jnp.pad(met, (0, width - met.shape[0]), constant_values=-1)

    def started(state: _State) -> Array:
        return lax.dynamic_slice_in_dim(starts, state.turn * width, width)

    def turn(state: _State) -> _State:
        # Of the queue that fills more of its block.
        listed, passed = state.listed.waiting, state.passed.waiting
        passing = (listed == 0) | (passed // blocks[1] > listed // blocks[0])
        kind = jnp.where(state.turn < start_turns, 0, jnp.where(passing, 2, 1))
        met = lax.switch(kind, [started, beside_listed, beside_passed], state)
        # Each node once: the first to leave its mark has it.
        mark = jnp.arange(width, dtype=mark_dtype)
        new = (met >= 0) & (state.seen[jnp.maximum(met, 0)] == unseen)
        seen = state.seen.at[jnp.where(new, met, walks * n)].min(mark, mode="drop")
        new &= seen[jnp.maximum(met, 0)] == mark
        eligible = terrain.eligible(met % n)
        passed = state.passed.past(jnp.where(kind == 2, blocks[1], 0))
        passed, lost = passed.add(met, new & ~eligible, room)
        lost = jnp.where(lost, met // n, walks)
        state = dataclasses.replace(
            state,
            turn=state.turn + 1,
            seen=seen,
            listed=state.listed.past(jnp.where(kind == 1, blocks[0], 0)),
            passed=passed,
            overflow=state.overflow.at[lost].set(True, mode="drop"),
        )
        state = _try_append(q, terrain, goal, met, new & eligible, state)
        keep = goal.keep
        if keep is None:
            return state
        listed = jnp.sum(state.count)

        def raised() -> tuple[Array, Array]:
            scores = jnp.moveaxis(state.scores.reshape(walks, capacity, group), 1, 2)
            best, _ = lax.top_k(scores, keep)
            return best[..., -1], listed

        # A bar of some turns ago is lower than it might be, which costs less than ranking anew.
        grown = listed > state.ranked + state.ranked // RANKED
        bar, ranked = lax.cond(grown, raised, lambda: (state.bar, state.ranked))
        return dataclasses.replace(state, bar=bar, ranked=ranked)

    def unfinished(state: _State) -> Array:
        waiting = (state.listed.waiting > 0) | (state.passed.waiting > 0)
        return (state.turn < start_turns) | waiting

    start = _State(
        turn=jnp.int32(0),
        seen=jnp.full(walks * n, unseen, mark_dtype),
        listed=_Queue.create(walks * capacity, blocks[0]),
        passed=_Queue.create(room, blocks[1]),
        count=jnp.zeros(walks, jnp.int32),
        positions=jnp.zeros(walks * capacity, jnp.int32),
        scores=jnp.full((walks * capacity, group), -jnp.inf),
        best=seed.astype(jnp.float32),
        bar=jnp.full((walks, group), -jnp.inf),
        ranked=jnp.int32(0),
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
        (end.seen != unseen).reshape(walks, n),
    )


def _try_append(
    q: Float[Array, "W G D"],
    terrain: Terrain,
    goal: Goal,
    met: Int[Array, " M"],
    new: Bool[Array, " M"],
    state: _State,
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
        listed, _ = state.listed.add(at, fits, walks * capacity)
        at = jnp.where(fits, at, walks * capacity)
        count = state.count + jnp.diff(upto[begin])
        return dataclasses.replace(
            state,
            listed=listed,
            count=jnp.minimum(count, capacity),
            positions=state.positions.at[at].set(position, mode="drop"),
            scores=state.scores.at[at].set(scores, mode="drop"),
            best=best,
            visited=state.visited + jnp.diff(begin),
            overflow=state.overflow | (count > capacity),
        )

    return lax.fori_loop(0, -(-total // TILE), tile, state)
