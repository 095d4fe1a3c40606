"""What an index knows of pages in mapped files: its leaves.

They lie in a file beside the pages, mapped as these are, so that a process that finds them there
reads no key and no value. What is not there is made of the pages, which are verified for it, and
written there; where that cannot be, all is held in this process's memory.

Either way it is numbered as the pages are, over all of the files: what is never touched takes no
room.
"""

import functools
import mmap
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from alaya_jax.cache.tiers import HostPages, HostPool, Leaves
from alaya_jax.index import LayerIndex
from alaya_jax.index.basis import Basis

AT_ONCE = 256
"""Pages that are looked at together, at most."""


class HostIndex:
    """The index of one layer's pages in mapped files, as far as it was asked.

    Threads take turns, under the pool's lock.

    Attributes:
      index: arrays [K, Q, ...], which programs read where they are.
    """

    def __init__(
        self,
        empty: LayerIndex,
        num_pages: int,
        leaves: Leaves | None = None,
        basis: Basis | None = None,
    ):
        """Args:
        empty: such an index, of any number of pages.
        num_pages: Q.
        leaves: the file; None: it is held in memory.
        basis: that a sketch is made by.
        """
        self._empty, self._leaves, self._basis = empty, leaves, basis
        self._memory: list[np.ndarray] | None = None
        """In place of what is mapped."""
        self._built = np.full(num_pages, -1, np.int64)
        """The birth of each page that `index` knows."""
        self.index: LayerIndex
        if leaves is None:
            self._hold()
        else:
            self._show(leaves.arrays)

    @property
    def in_memory(self) -> bool:
        """Whether it is held in this process's memory."""
        return self._memory is not None

    @property
    def let_go(self) -> Callable[[np.ndarray], None] | None:
        """Gives back the memory of some pages' leaves; None: they are held, and nowhere else."""
        return None if self._leaves is None or self.in_memory else self._leaves.let_go

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return sum(x.nbytes // x.shape[1] for x in jax.tree.leaves(self._empty))

    def build(
        self,
        host: HostPool,
        layer: int,
        pages: Int[np.ndarray, " n"],
        births: Int[np.ndarray, " n"],
    ) -> None:
        """Has it know these pages, which are full.

        What it knew of a page of another birth is gone: nobody reads that page any more. So only
        pages that no program reads are written to.

        Raises:
          ContextError: a page that has to be read is damaged.
        """
        missing = np.flatnonzero(self._built[pages] != births)
        if self._leaves is not None and len(missing):
            self._take(pages[missing], births[missing])
        while len(missing := np.flatnonzero(self._built[pages] != births)):
            some = missing[:AT_ONCE]
            parts = self._made(host, layer, pages[some])
            self._keep(pages[some], births[some], parts)

    def _made(self, host: HostPool, layer: int, pages: np.ndarray) -> list[np.ndarray]:
        """Leaves of at most `AT_ONCE` pages, made of their keys and values."""
        host.verify(layer, pages)
        ids = np.full(1 + AT_ONCE, pages[0], np.int32)  # the first is lost: see `NO_PAGE`
        ids[1 : 1 + len(pages)] = pages
        found = jax.tree.leaves(_of_pages(self._empty, self._basis, host.layers[layer], ids))
        return [np.asarray(part)[:, 1 : 1 + len(pages)] for part in found]

    def _take(self, pages: np.ndarray, births: np.ndarray) -> None:
        """Knows those of some pages whose leaves the file has."""
        assert self._leaves is not None
        known = self._leaves.known(pages, births)
        pages, births = pages[known], births[known]
        for array, mapped in zip(self._memory or (), self._leaves.arrays, strict=False):
            array[:, pages] = mapped[:, pages]
        self._built[pages] = births

    def _keep(self, pages: np.ndarray, births: np.ndarray, parts: list[np.ndarray]) -> None:
        """Keeps leaves in the file for all, if that can be, else in memory."""
        written = self._leaves is not None and self._leaves.write(pages, births, parts)
        if not written and self._memory is None:
            self._hold()
        for array, part in zip(self._memory or (), parts, strict=False):
            array[:, pages] = part
        self._built[pages] = births

    def _hold(self) -> None:
        """Goes on in memory, with what the file has of the pages it knows."""
        leaves = jax.tree.leaves(self._empty)
        num_pages = len(self._built)
        self._memory = [_zeros((x.shape[0], num_pages, *x.shape[2:]), x.dtype) for x in leaves]
        known = np.flatnonzero(self._built != -1)
        births = self._built[known]
        self._built[known] = -1
        if self._leaves is not None:
            self._take(known, births)
        self._show(self._memory)

    def _show(self, arrays: "tuple[np.ndarray, ...] | list[np.ndarray]") -> None:
        structure = jax.tree.structure(self._empty)
        self.index = jax.tree.unflatten(structure, map(jax.device_put, arrays))


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Pages of the system's own that hold zeros, and are there once they are written to."""
    count = int(np.prod(shape)) * dtype.itemsize
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype).reshape(shape)


@jax.jit
def _of_pages(
    empty: LayerIndex, basis: Basis | None, host: HostPages, ids: Int[Array, " n"]
) -> LayerIndex:
    """The index of just these pages."""
    k, v = host.k[:, ids], host.v[:, ids]
    number = ids.shape[0]
    grown = jax.tree.map(functools.partial(_grown, number), empty)
    filled = jnp.full(number, k.shape[2], jnp.int32)
    args = k, v, jnp.arange(number, dtype=jnp.int32), filled
    return grown.seen_by(basis).build(*args).seen_by(None)


def _grown(number: int, x: Array) -> Array:
    return jnp.zeros((x.shape[0], number, *x.shape[2:]), x.dtype)
