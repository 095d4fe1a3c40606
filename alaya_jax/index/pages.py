"""The indexes of a pool's pages: which index knows which page, and building what is missing."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alaya_jax import cache
from alaya_jax.cache.pool import PagedSequence, PagePool
from alaya_jax.cache.tables import bucket
from alaya_jax.cache.tiers import HostPool, Leaves, Tiers
from alaya_jax.errors import RequestError
from alaya_jax.index import Block, Flat, Graph, Index, Indexed, LayerIndex, Sketch
from alaya_jax.index.basis import Basis
from alaya_jax.index.host import AT_ONCE, HostIndex
from alaya_jax.index.learnt import Learnt
from alaya_jax.index.room import Claim, Part, Parts, Room, by_name
from alaya_jax.sharding import ShardingRules

INDEX_WIDTH = 8
"""Pages indexed at once, at least; more are this times a power of four."""


class PageIndexes:
    """What indexes know of the pages of a pool, for all sequences that share a page.

    Threads may share it: they take turns under the pool's lock.

    Attributes:
      pool: whose pages.
      room: the memory that they share with these and with graphs.
    """

    def __init__(
        self,
        pool: PagePool,
        find_learnt: Callable[[], Learnt | None] | None = None,
        room: Room | None = None,
    ):
        """Of this pool's pages; what was learnt of a page holds for its generation.

        Args:
          pool: of a model.
          find_learnt: looks for what the model's sketches learnt; what it once found stays.
          room: see the class; None: as much as there is.
        """
        self.pool = pool
        self.room = room or Room()
        self._find_learnt, self._learnt = find_learnt, None
        self._looking = threading.RLock()
        self._bases: dict[tuple[float, int], Basis] = {}
        self._host: dict[str, dict[tuple[Block | Sketch, int], HostIndex]] = {}
        """Of pages in mapped files, by the files' name."""
        self._indexes: dict[tuple[Block | Sketch, int], _LayerState] = {}

    @property
    def learnt(self) -> Learnt | None:
        """What the model's sketches learnt of its queries and keys; None: nothing that is there."""
        with self._looking:  # not the pool's: who closes a session must not wait for that
            if self._learnt is None and self._find_learnt is not None:
                self._learnt = self._find_learnt()
            return self._learnt

    def _basis(self, index: Block | Sketch, layer: int) -> Basis | None:
        if not isinstance(index, Sketch) or index.basis == "random":
            return None
        learnt, key = self.learnt, (index.bits, layer)
        if learnt is None:
            raise RequestError(
                f"{index!r}: nothing was learnt of this model's keys; run aj.calibrate(model, "
                f"texts), or use {index.random()!r}"
            )
        if key not in self._bases:
            made, pool = learnt.layers[layer].basis(index.bits), self.pool
            if pool.mesh is not None:
                spec = PartitionSpec(pool.rules.axis("kv_heads", pool.mesh))
                made = jax.device_put(made, NamedSharding(pool.mesh, spec))
            self._bases[key] = made
        return self._bases[key]

    def parts(self, indexes: Sequence[Index]) -> dict[Part, int]:
        """What indexes take beside the pages, all of which they have room for.

        Args:
          indexes: of each layer. `Flat` holds nothing, and a graph is of a context, not of pages.
        """
        return {
            (index, layer): self._size(index)
            for layer, index in enumerate(indexes)
            if not isinstance(index, Flat | Graph)
        }

    def _size(self, index: Block | Sketch) -> int:
        """Bytes of one layer."""
        pool = self.pool
        return pool.num_pages * index.page_bytes(pool.config, pool.page_size, pool.dtype)

    def make_room(self, wanted: Parts, claim: Claim | None = None) -> None:
        """Drops indexes that no batch asks, where others need their memory.

        Args:
          wanted: parts of indexes, and of graphs.
          claim: see `Room.make`.

        Raises:
          CacheFullError: there is not enough of it; see `Room.make`.
        """
        with self.pool.lock:
            made = {part: self._size(part[0]) for part in self._indexes}
            for part in self.room.make(made, wanted, claim):
                del self._indexes[part]

    def cover(self, indexes: Sequence[Index], sequences: list[PagedSequence]) -> Indexed:
        """Has the indexes know the full pages of these sequences.

        What was built once stays, for every sequence that shares the page, until a budget's memory
        is needed for other indexes (`make_room`).

        Args:
          indexes: of each layer, see `parts`.
          sequences: in the pool.

        Raises:
          CacheFullError: there is no memory for one that is not there.
        """
        pool, size = self.pool, self.pool.page_size
        full = [s.pages[: s.length // size] for s in sequences]
        pages = np.unique(np.concatenate(full))
        own = pool.own(pages)
        in_files = [
            (s.host, len(ids) - len(pool.own(ids)))
            for s, ids in zip(sequences, full, strict=True)
            if s.host is not None
        ]
        layers: list[Any] = []
        with pool.here(), pool.lock:
            if not (wanted := self.parts(indexes)).keys() <= self._indexes.keys():
                self.make_room(wanted)
            for layer, index in enumerate(indexes):
                if isinstance(index, Flat | Graph):
                    layers.append(None)
                    continue
                basis = self._basis(index, layer)
                state = self._indexes.get((index, layer))
                if state is None:
                    state = self._indexes[index, layer] = self._new_index(index)
                missing = own[state.built[own] != pool.generations(own)]
                if len(missing):
                    self._build(state, layer, missing, basis)
                held = state.index
                if in_files:
                    beside = self._host_index(index, layer, in_files, basis)
                    held = jax.tree.map(Tiers, held, beside)
                layers.append(held.seen_by(basis))
            return Indexed(
                tuple(layers),
                jax.device_put(np.asarray([len(p) * size for p in full], np.int32)),
            )

    def _host_index(
        self,
        index: Block | Sketch,
        layer: int,
        in_files: list[tuple[HostPool, int]],
        basis: Basis | None,
    ) -> LayerIndex:
        """What an index knows of pages in mapped files: of each context, the first so many among
        them. The contexts' files are of one name.
        """
        first, _ = in_files[0]
        known = self._host.setdefault(first.name, {})
        if (index, layer) not in known:
            p = self.pool
            few = index.create(p.config, 1, p.page_size, p.dtype)
            leaves = self._leaves(index, layer, first, few)
            known[index, layer] = HostIndex(few, first.num_pages, leaves, basis)
        held = known[index, layer]
        for host, count in in_files:
            held.build(host, layer, host.pages[:count], host.births[:count])
        account, residency = first.account, first.account.residency
        since = residency.now
        kept = account.leaves((index, layer, held.in_memory), held.page_bytes, held.let_go)
        for host, count in in_files:
            residency.touch(kept, host.pages[:count])
        residency.make_room(since=since)
        return held.index

    def _leaves(
        self, index: Block | Sketch, layer: int, host: HostPool, of_one: LayerIndex
    ) -> Leaves | None:
        """The file of what an index knows of a layer of mapped pages."""
        arrays = [(x.shape[2:], x.dtype.name) for x in jax.tree.leaves(of_one)]
        config = self.pool.config
        if isinstance(index, Sketch) and index.basis == "learnt":
            assert self._learnt is not None
            formula = index.formula(config, self._learnt.layers[layer].digest())
        else:
            formula = index.formula(config)
        made = {"index": repr(index), **formula}
        return host.leaves(layer, made, arrays)

    def share_leaves(self, sequence: PagedSequence, host: HostPool) -> None:
        """Puts what is known of a sequence's pages into the files of a context of the same tokens,
        for processes to come; what cannot be written there is left.

        Args:
          sequence: in the pool.
          host: the context's pages.
        """
        pool = self.pool
        count = min(len(host.pages), sequence.length // pool.page_size)
        own = np.flatnonzero(sequence.pages[:count] < pool.num_pages)
        for (index, layer), state in list(self._indexes.items()):
            leaves = self._leaves(index, layer, host, state.index)
            if leaves is None:
                continue
            new = own[~leaves.claimed(host.pages[own], host.births[own])]
            for first in range(0, len(new), AT_ONCE):
                at = new[first : first + AT_ONCE]
                with pool.lock:  # not while it is written: others would wait for the disk
                    ids = sequence.pages[at]
                    known = state.built[ids] == pool.generations(ids)
                    ids, at = ids[known], at[known]
                    parts = [np.asarray(x)[:, ids] for x in jax.tree.leaves(state.index)]
                leaves.write(host.pages[at], host.births[at], parts)

    def _new_index(self, index: Block | Sketch) -> "_LayerState":
        p = self.pool
        with p.within_memory(f"{index!r} beside the KV cache"):
            made = index.create(p.config, p.num_pages, p.page_size, p.dtype, p.mesh, p.rules)
        return _LayerState(made, np.zeros(p.num_pages, np.int64))

    def nbytes(self) -> dict[str, int]:
        """Bytes that each index and graph takes beside the pages, all layers, by account: those
        that batches ask and that are not made yet, too.
        """
        made = {part: self._size(part[0]) for part in list(self._indexes)}
        return by_name({**made, **self.room.claimed(), **self.room.graphs})

    def _build(
        self, state: "_LayerState", layer: int, missing: np.ndarray, basis: Basis | None
    ) -> None:
        pool, kv = self.pool, self.pool.kv
        shard, local = np.divmod(missing, pool.num_pages // pool.shards)
        by_shard = [local[shard == s] for s in range(pool.shards)]
        width = bucket(max(map(len, by_shard)), INDEX_WIDTH, 4)
        ids = np.full((pool.shards, width), cache.NO_PAGE, np.int32)
        for row, pages in zip(ids, by_shard, strict=True):
            row[: len(pages)] = pages
        filled = np.where(ids == cache.NO_PAGE, 0, pool.page_size).astype(np.int32)
        with pool.alone():
            state.index = _build_index(
                state.index,
                kv.k[layer],
                kv.v[layer],
                ids.ravel(),
                filled.ravel(),
                basis,
                mesh=pool.mesh,
                rules=pool.rules,
            )
            state.built[missing] = pool.generations(missing)


@dataclasses.dataclass
class _LayerState:
    """An index of one layer, and which pages it knows.

    Attributes:
      index: what it holds.
      built: int64 [P], the generation in which it last looked at each page; 0: never.
    """

    index: LayerIndex
    built: np.ndarray


@functools.partial(jax.jit, static_argnames=("mesh", "rules"), donate_argnames=("index",))
def _build_index(
    index: LayerIndex,
    k_pages: jax.Array,
    v_pages: jax.Array,
    ids: jax.Array,
    filled: jax.Array,
    basis: Basis | None,
    *,
    mesh: Mesh | None,
    rules: ShardingRules,
) -> LayerIndex:
    def make(index: LayerIndex, basis: Basis | None, *args: jax.Array) -> LayerIndex:
        return index.seen_by(basis).build(*args).seen_by(None)

    if mesh is None:
        return make(index, basis, k_pages, v_pages, ids, filled)
    pages = rules.axis("pages", mesh)
    heads = PartitionSpec(rules.axis("kv_heads", mesh))
    pool, some = PartitionSpec(*heads, pages), PartitionSpec(pages)
    build = jax.shard_map(
        make,
        mesh=mesh,
        in_specs=(pool, heads, pool, pool, some, some),
        out_specs=pool,
        check_vma=False,
    )
    return build(index, basis, k_pages, v_pages, ids, filled)
