"""What an index knows of pages in mapped files.

It is numbered as they are, over all of the files: memory that is never touched takes no room.
"""

import functools
import mmap

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from alaya_jax.cache.tiers import HostPages
from alaya_jax.index import LayerIndex

AT_ONCE = 256
"""Pages that are looked at together, at most."""


class HostIndex:
    """The index of one layer's pages in mapped files, as far as it was asked.

    Threads take turns, under the pool's lock.

    Attributes:
      index: arrays [K, Q, ...], which programs read where they are.
    """

    def __init__(self, empty: LayerIndex, num_pages: int):
        """Args:
        empty: such an index, of any number of pages.
        num_pages: Q.
        """
        self._empty = empty
        leaves, structure = jax.tree.flatten(empty)
        self._memory = [_zeros((x.shape[0], num_pages, *x.shape[2:]), x.dtype) for x in leaves]
        self.index: LayerIndex = jax.tree.unflatten(structure, map(jax.device_put, self._memory))
        self._built = np.full(num_pages, -1, np.int64)
        """The birth of each page that it knows."""

    def build(
        self, host: HostPages, pages: Int[np.ndarray, " n"], births: Int[np.ndarray, " n"]
    ) -> None:
        """Has it know these pages, which are full and were verified.

        What it knew of a page of another birth is gone: nobody reads that page any more. So only
        pages that no program reads are written to.
        """
        new = self._built[pages] != births
        missing, births = pages[new], births[new]
        for first in range(0, len(missing), AT_ONCE):
            some = missing[first : first + AT_ONCE]
            ids = np.full(1 + AT_ONCE, some[0], np.int32)  # the first is lost: see `NO_PAGE`
            ids[1 : 1 + len(some)] = some
            found = jax.tree.leaves(_of_pages(self._empty, host, ids))
            for memory, part in zip(self._memory, found, strict=True):
                memory[:, some] = np.asarray(part)[:, 1 : 1 + len(some)]
            self._built[some] = births[first : first + AT_ONCE]


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Pages of the system's own that hold zeros, and are there once they are written to."""
    count = int(np.prod(shape)) * dtype.itemsize
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype).reshape(shape)


@jax.jit
def _of_pages(empty: LayerIndex, host: HostPages, ids: Int[Array, " n"]) -> LayerIndex:
    """The index of just these pages."""
    k, v = host.k[:, ids], host.v[:, ids]
    number = ids.shape[0]
    grown = jax.tree.map(functools.partial(_grown, number), empty)
    filled = jnp.full(number, k.shape[2], jnp.int32)
    return grown.build(k, v, jnp.arange(number, dtype=jnp.int32), filled)


def _grown(number: int, x: Array) -> Array:
    return jnp.zeros((x.shape[0], number, *x.shape[2:]), x.dtype)
