"""Pages of two pools under one numbering: the pool that programs write to, and one in mapped files
that is only read.

A page table names pages of both: a sequence may lie in either, or go on from one in the other, and
attention reads a page where it lies. On a CPU a mapped file enters a program as it is, without a
copy: of a context on disk only the pages that are read come into memory.
"""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from alaya_jax.at_rest import StoreDtype, decoded
from alaya_jax.cache.residency import FileAccount, PagesMet, Residency


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
    """Pages [K, Q, Z, D] that are stored in 8 bits: what is read of them is decoded then.

    Attributes:
      rows: [K, Q, Z, D + 2], see `at_rest`.
      kind: what the codes are.
      dtype: what they are decoded to.
    """

    rows: UInt8[Array, "K Q Z W"]
    kind: StoreDtype = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[K, Q, Z, D]."""
        return jax.eval_shape(self._of, self.rows).shape

    def _of(self, rows: Any) -> Any:
        return decoded(rows, self.kind, self.dtype)

    def __getitem__(self, at: Any) -> Array:
        """Some pages or tokens: the last axis is whole."""
        return self._of(self.rows[at])

    def slice(self, start: Sequence[Any], sizes: Sequence[int]) -> Array:
        """`lax.dynamic_slice`, of whole rows."""
        return self._of(lax.dynamic_slice(self.rows, start, (*sizes[:-1], self.rows.shape[-1])))

    def on_host(self, pages: np.ndarray) -> np.ndarray:
        """Copies of some pages [K, n, Z, D], decoded by numpy."""
        return self._of(np.asarray(self.rows)[:, pages])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostPages:
    """Keys and values of one layer in mapped files.

    Attributes:
      k, v: [K, Q, Z, D], never written to.
    """

    k: Float[Array, "K Q Z D"] | Coded
    v: Float[Array, "K Q Z D"] | Coded


class Verify(Protocol):
    """Compares pages of a layer with their checksums."""

    def __call__(self, layer: int, pages: np.ndarray, asked: np.ndarray | None = None) -> int:
        """How many bytes were not compared before; raises ContextError where a page is damaged. Of
        `asked`, bool [2, K, n], only keys (0) and values (1) of heads and pages that are true.
        """
        ...


class Leaves(Protocol):
    """What an index knows of the pages of one layer, in a file beside them.

    Who asks or writes holds the pages of these births; other processes may do so at the same time.
    """

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """[K, Q, ...] each, mapped, to be read only."""
        ...

    def claimed(self, pages: np.ndarray, births: np.ndarray) -> np.ndarray:
        """Of which of some pages [n] the file says, rightly or not, to have leaves: bool [n]."""
        ...

    def known(self, pages: np.ndarray, births: np.ndarray) -> np.ndarray:
        """Of which of some pages [n] `arrays` hold right leaves: bool [n]."""
        ...

    def write(self, pages: np.ndarray, births: np.ndarray, parts: Sequence[np.ndarray]) -> bool:
        """Puts leaves, [K, n, ...] of each array, into the file; whether `arrays` hold them now."""
        ...

    def let_go(self, pages: np.ndarray) -> None:
        """Gives back the memory of some pages' leaves; they are read again when next used."""
        ...


class HostPool:
    """A context's pages in mapped files, of all layers. They stay as long as this object lives.

    Attributes:
      name: of the files; pools of one name number the same pages.
      layers: of each layer; among the Q pages are those of other contexts.
      pages: int32 [n], the context's, in order.
      births: int64 [n], which write made each: what was learnt of a page holds for its birth.
      account: of what is kept of these files in memory.
      reads: what was met of its pages since somebody last took this account.
    """

    def __init__(
        self,
        name: str,
        layers: tuple[HostPages, ...],
        pages: np.ndarray,
        births: np.ndarray,
        *,
        account: FileAccount | None = None,
        verify: Verify = lambda layer, pages, asked=None: 0,
        leaves: Callable[
            [int, Mapping[str, Any], Sequence[tuple[tuple[int, ...], str]]], Leaves | None
        ] = lambda layer, made, arrays: None,
        release: Callable[[], None] = lambda: None,
    ):
        """Args:
        name, layers, pages, births: see the class.
        account: see the class; None begins one without a bound.
        verify: see `Verify`.
        leaves: opens the file of what an index knows of a layer: (layer, all that it depends on
          beside the pages, shape and dtype of each array); None where there is none.
        release: called when nobody holds the pool any more.
        """
        self.name, self.layers, self.pages, self.births = name, layers, pages, births
        k = layers[0].k
        heads = k.shape[0]
        rows = k.rows if isinstance(k, Coded) else k
        self.account = account or FileAccount(Residency(), name, rows)
        self._verify, self.leaves = verify, leaves
        self._verified = np.zeros((len(layers), 2, heads, len(pages)), bool)
        """Of each layer, of keys and values, each head and page."""
        self.reads = PagesMet.nothing(len(layers))
        self._first: HostPool | None = None
        self._end = weakref.finalize(self, release)

    def again(self) -> "HostPool":
        """The same pages for another holder, with an account of its own of what was met."""
        other = copy.copy(self)
        other._first = self._first or self
        other.reads = PagesMet.nothing(len(self.layers))
        return other

    @property
    def num_pages(self) -> int:
        """Q."""
        return self.layers[0].k.shape[1]

    def take_reads(self) -> PagesMet:
        """`reads`, which begins anew."""
        reads, self.reads = self.reads, PagesMet.nothing(len(self.layers))
        return reads

    def meet(self, layer: int, met: UInt8[np.ndarray, "K N"] | int, *, in_pool: int = 0) -> int:
        """Counts pages that a program meets.

        Args:
          layer: which.
          met: of the first N pages, whether keys (1) and values (2) are read; or N: all of these.
          in_pool: pages of each head that it meets in the pool.

        Returns:
          bytes that were not in memory.
        """
        count, pieces = (met, None) if isinstance(met, int) else (met.shape[1], met)
        residency, kept = self.account.residency, self.account.layer(layer)
        memory, disk, size = residency.touch(kept, self.pages[:count], pieces)
        residency.count(memory, disk)
        self.reads.pool[layer] += in_pool
        self.reads.memory[layer] += memory
        self.reads.disk[layer] += disk
        self.reads.bytes_read[layer] += size
        return size

    def verify(self, layer: int, pages: np.ndarray | None = None) -> None:
        """Compares a layer's pages, or some of them, with their checksums, once.

        Raises:
          ContextError: one is damaged.
        """
        if self._verified[layer].all():
            return
        self._read(layer, self.pages if pages is None else pages)
        if pages is None:
            self._verified[layer] = True

    def _read(self, layer: int, pages: np.ndarray) -> None:
        """Compares pages with their checksums; they are in memory then."""
        residency = self.account.residency
        since = residency.now
        *_, size = residency.touch(self.account.layer(layer), pages)
        self.reads.bytes_read[layer] += size
        residency.make_room(since=since)
        self._compared(layer, self._verify(layer, pages))

    def _compared(self, layer: int, count: int) -> None:
        self.reads.bytes_verified[layer] += count
        self.account.residency.verified(count)

    def verify_met(self, layer: int, met: UInt8[np.ndarray, "K N"], *, in_pool: int = 0) -> int:
        """Counts pages that an answer came from, and compares them with their checksums, once.

        Args, returns: see `meet`.

        Raises:
          ContextError: one is damaged.
        """
        size = self.meet(layer, met, in_pool=in_pool)
        known = self._verified[layer][..., : met.shape[1]]
        missing = np.stack([met & 1, met & 2]).astype(bool) & ~known
        pages = np.flatnonzero(missing.any(axis=(0, 1)))
        if len(pages):
            self._compared(layer, self._verify(layer, self.pages[pages], missing[..., pages]))
            known |= missing
        return size

    def verified(self) -> tuple[HostPages, ...]:
        """`layers`, all of them compared with their checksums; raises as `verify`."""
        for layer in range(len(self.layers)):
            self.verify(layer)
        return self.layers

    def read(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of some pages of every layer, each [L, K, n, Z, D].

        Raises:
          ContextError: one is damaged.
        """
        each = [self.read_layer(layer, pages) for layer in range(len(self.layers))]
        k, v = (np.stack(copies) for copies in zip(*each, strict=True))
        return k, v

    def read_layer(self, layer: int, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copies of some pages of a layer, each [K, n, Z, D]; raises as `read`."""
        self._read(layer, pages)
        one = self.layers[layer]
        return _copied(one.k, pages), _copied(one.v, pages)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiers:
    """One pool of P + Q pages: ids from P on are of the second.

    Attributes:
      device: [K, P, ...], the pool that programs write to.
      host: [K, Q, ...], one that is only read.
    """

    device: Array
    host: Array | Coded

    @property
    def shape(self) -> tuple[int, ...]:
        """[K, P + Q, ...]."""
        heads, pages, *page = self.device.shape
        return (heads, pages + self.host.shape[1], *page)

    @property
    def dtype(self) -> Any:
        """Of both."""
        return self.device.dtype

    def is_run(self, first: Array, count: Array | int) -> Array:
        """Whether pages `first`, `first + 1`, ... are all of one pool."""
        split = self.device.shape[1]
        within = (first >= split) | (first + count <= split)
        return within & (first + count <= self.shape[1])

    def run(self, first: Array, count: int) -> Array:
        """Consecutive pages [K, count, ...], where `is_run`."""
        split = self.device.shape[1]

        def of_device() -> Array:
            return lax.dynamic_slice_in_dim(self.device, first, count, axis=1)

        def of_host() -> Array:
            heads, _, *page = self.shape
            start = (0, first - split, *(0 for _ in page))
            return _slice(self.host, start, (heads, count, *page))

        if count > split:  # it would not be a run there
            return of_host()
        return (
            of_device()
            if count > self.host.shape[1]
            else lax.cond(first < split, of_device, of_host)
        )

    def pages(self, ids: Int[Array, " n"]) -> Float[Array, "K n Z D"]:
        """Some pages, of either pool."""
        split = self.device.shape[1]
        device = self.device[:, jnp.minimum(ids, split - 1)]
        host = self.host[:, jnp.maximum(ids - split, 0)]
        return jnp.where((ids < split)[:, None, None], device, host)

    def page(self, head: Array, id: Array) -> Array:
        """One page of one kv head, [...]."""
        split, shape = self.device.shape[1], self.device.shape[2:]

        def of(pool: Array | Coded, id: Array) -> Array:
            start = (head, id, *(0 for _ in shape))
            return _slice(pool, start, (1, 1, *shape))[0, 0]

        return lax.cond(id < split, lambda: of(self.device, id), lambda: of(self.host, id - split))

    def tokens(
        self, head: Int[Array, "..."], id: Int[Array, "..."], slot: Int[Array, "..."]
    ) -> Float[Array, "... D"]:
        """Single tokens of some pages."""
        split = self.device.shape[1]
        # Both pools are read, one of them at its edge: a page that is in memory soon, and stays.
        device = self.device[head, jnp.minimum(id, split - 1), slot]
        host = self.host[head, jnp.maximum(id - split, 0), slot]
        return jnp.where((id < split)[..., None], device, host)


Pool = Array | Tiers
"""[K, P, ...]: pages in one pool, or in two."""


def joined(device: Array, host: Array | Coded | None) -> Pool:
    """The pool that a table names pages of; without a host's, as it is."""
    return device if host is None else Tiers(device, host)


def _slice(pool: Array | Coded, start: Sequence[Any], sizes: Sequence[int]) -> Array:
    if isinstance(pool, Coded):
        return pool.slice(start, sizes)
    return lax.dynamic_slice(pool, start, sizes)


def _copied(pool: Array | Coded, pages: np.ndarray) -> np.ndarray:
    return pool.on_host(pages) if isinstance(pool, Coded) else np.asarray(pool)[:, pages]
