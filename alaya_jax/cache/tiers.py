"""Pages of two pools under one numbering: the pool that programs write to, and one in mapped files
that is only read.

A page table names pages of both: a sequence may lie in either, or go on from one in the other, and
attention reads a page where it lies. On a CPU a mapped file enters a program as it is, without a
copy: of a context on disk only the pages that are read come into memory.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostPages:
    """Keys and values of one layer in mapped files.

    Attributes:
      k, v: [K, Q, Z, D], never written to.
    """

    k: Float[Array, "K Q Z D"]
    v: Float[Array, "K Q Z D"]


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


class HostPool:
    """A context's pages in mapped files, of all layers. They stay as long as this object lives.

    Attributes:
      name: of the files; pools of one name number the same pages.
      layers: of each layer; among the Q pages are those of other contexts.
      pages: int32 [n], the context's, in order.
      births: int64 [n], which write made each: what was learnt of a page holds for its birth.
    """

    def __init__(
        self,
        name: str,
        layers: tuple[HostPages, ...],
        pages: np.ndarray,
        births: np.ndarray,
        *,
        verify: Callable[[int, np.ndarray], None] = lambda layer, pages: None,
        leaves: Callable[
            [int, Mapping[str, Any], Sequence[tuple[tuple[int, ...], str]]], Leaves | None
        ] = lambda layer, made, arrays: None,
        release: Callable[[], None] = lambda: None,
    ):
        """Args:
        name, layers, pages, births: see the class.
        verify: raises ContextError where pages of a layer are damaged.
        leaves: opens the file of what an index knows of a layer: (layer, all that it depends on
          beside the pages, shape and dtype of each array); None where there is none.
        release: called when nobody holds the pool any more.
        """
        self.name, self.layers, self.pages, self.births = name, layers, pages, births
        self._verify, self.leaves = verify, leaves
        self._verified = [False] * len(layers)
        self._end = weakref.finalize(self, release)

    @property
    def num_pages(self) -> int:
        """Q."""
        return self.layers[0].k.shape[1]

    def verify(self, layer: int, pages: np.ndarray | None = None) -> None:
        """Compares a layer's pages, or some of them, with their checksums, once.

        Raises:
          ContextError: one is damaged.
        """
        if self._verified[layer]:
            return
        if pages is not None:
            self._verify(layer, pages)
        else:
            self._verify(layer, self.pages)
            self._verified[layer] = True

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
        for layer in range(len(self.layers)):
            self._verify(layer, pages)
        k, v = (
            np.stack([np.asarray(pool)[:, pages] for pool in pools])
            for pools in zip(*((one.k, one.v) for one in self.layers), strict=True)
        )
        return k, v


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiers:
    """One pool of P + Q pages: ids from P on are of the second.

    Attributes:
      device: [K, P, ...], the pool that programs write to.
      host: [K, Q, ...], one that is only read.
    """

    device: Array
    host: Array

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
            return lax.dynamic_slice_in_dim(self.host, first - split, count, axis=1)

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

        def of(pool: Array, id: Array) -> Array:
            start = (head, id, *(0 for _ in shape))
            return lax.dynamic_slice(pool, start, (1, 1, *shape))[0, 0]

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


def joined(device: Array, host: Array | None) -> Pool:
    """The pool that a table names pages of; without a host's, as it is."""
    return device if host is None else Tiers(device, host)
