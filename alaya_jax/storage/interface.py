"""What the database asks of a store, and the words both use. Nothing here knows of files."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from alaya_jax.errors import RequestError

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextHeader:
    """What a context is, beside its tokens.

    Attributes:
      fingerprint: of the model that made the keys and values; a caller compares it with its own.
      dtype: of the keys and values, "float32", "float16" or "bfloat16".
      num_layers: L.
      num_kv_heads: K.
      head_dim: D.
      page_size: Z, the tokens of a page in the cache it came from.
      origin: how the keys and values were computed, (first token, plan) of each stretch from the
        first that is not exact on; empty: all are exact.
      namespace: keeps tenants apart: a context is found only in its own.
      title: for people; no part of the identity.

    Raises:
      RequestError: a field is of a wrong type or out of range.
    """

    fingerprint: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    origin: tuple[tuple[int, str], ...] = ()
    namespace: str = ""
    title: str = ""

    def __post_init__(self):
        pairs = tuple((int(first), str(plan)) for first, plan in self.origin)  # JSON has lists
        object.__setattr__(self, "origin", pairs)
        if self.dtype not in DTYPES:
            raise RequestError(f"context: dtype={self.dtype!r}; use one of {', '.join(DTYPES)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (isinstance(value, int) and value > 0):
                raise RequestError(f"context: {field.name}={value!r}; use a count from 1")
            if field.type is str and not isinstance(value, str):
                raise RequestError(f"context: {field.name}={value!r}; use a string")

    def context_id(self, tokens: np.ndarray) -> str:
        """The name of `tokens` [n] of this model, layout, origin and namespace; equal contexts
        share it.
        """
        named = (self.fingerprint, self.namespace, self.dtype, self.page_size, self.origin)
        digest = hashlib.blake2b(repr(named).encode(), digest_size=12)
        digest.update(np.ascontiguousarray(tokens, "<i4"))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextRecord:
    """One line of a store's list.

    Attributes:
      id: name of the context in its store.
      header: None when damage makes it unreadable.
      num_tokens: n; 0 when unreadable.
      created: seconds since 1970, UTC; 0 when unreadable.
      problem: why the context cannot be used, and the way out; None when all looks well. Only
        `ContextStore.check` reads every byte.
    """

    id: str
    header: ContextHeader | None
    num_tokens: int
    created: float
    problem: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, 2 L K n D times the size of the dtype."""
        h = self.header
        if h is None:
            return 0
        size = DTYPES[h.dtype].itemsize
        return 2 * h.num_layers * h.num_kv_heads * self.num_tokens * h.head_dim * size


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexRecord:
    """An index that is stored with a context.

    Attributes:
      kind: its name; a context has one of a kind.
      settings: how it was built; plain data.
      nbytes: its size.
      problem: why it cannot be used, and the way out; None when all looks well.
    """

    kind: str
    settings: Mapping[str, Any]
    nbytes: int
    problem: str | None = None


class ContextStore(Protocol):
    """Where contexts live between processes: all that a database uses of its store."""

    @property
    def path(self) -> Path:
        """Where it is, for errors."""
        ...

    def require_writable(self) -> None:
        """Raises DatabaseError when nothing can be written: closed, or open for reading only."""
        ...

    def list(self, namespace: str | None = None) -> Sequence[ContextRecord]:
        """All contexts, oldest first, damaged ones too (see `ContextRecord.problem`).

        With a namespace, only its own; a context too damaged to tell is in none.
        """
        ...

    def tokens(self, id: str) -> np.ndarray:
        """The context's token ids, i32 [n]. Raises ContextError when unknown or damaged."""
        ...

    def write(
        self,
        header: ContextHeader,
        tokens: Any,
        kv: Iterable[tuple[Any, Any]],
        progress: Callable[[int, int], None] | None = None,
    ) -> ContextRecord:
        """Stores a context, all of it or nothing, and returns its record.

        A context already there is kept as it is, and `kv` is not read.

        Args:
          header: what the context is.
          tokens: ids [n], n > 0.
          kv: yields (k, v), each [K, n, D] of the header's dtype, layer by layer from 0; only one
            layer needs to be in memory.
          progress: called as progress(layers written, L) after each layer.

        Raises:
          RequestError: tokens or kv do not have the shape or dtype that the header says.
          DatabaseError: the store is closed, read-only, full, or fails to write.
        """
        ...

    def read_kv(
        self, id: str, layer: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of tokens [start, stop) of one layer, each [K, stop - start, D].

        The arrays are read-only, and may be views of a mapped file. What is returned was verified.

        Raises:
          ContextError: the context is unknown or damaged.
          RequestError: no such layer or tokens.
        """
        ...

    def indexes(self, id: str) -> Mapping[str, IndexRecord]:
        """The indexes of a context, by kind; damaged ones too."""
        ...

    def write_index(
        self,
        id: str,
        kind: str,
        settings: Mapping[str, Any],
        layers: Iterable[Mapping[str, np.ndarray]],
    ) -> None:
        """Stores an index with its context, all of it or nothing, in place of one of the same kind.

        Args:
          id: of the context.
          kind: name of the index, letters.
          settings: how it was built; plain data.
          layers: yields arrays by name, layer by layer from 0; only one needs to be in memory.

        Raises:
          ContextError: the context is unknown.
          DatabaseError: the store is closed, read-only, full, or fails to write.
        """
        ...

    def read_index(self, id: str, kind: str, layer: int) -> dict[str, np.ndarray]:
        """Arrays of one layer of an index, by name; verified.

        Raises:
          ContextError: the context or the index is unknown or damaged.
        """
        ...

    def check_index(self, id: str, kind: str) -> Sequence[str]:
        """Reads all of an index; every problem found, in words."""
        ...

    def check(self, id: str) -> Sequence[str]:
        """Reads all of a context and its indexes; every problem found, in words."""
        ...

    def remove(self, id: str) -> None:
        """Deletes a context, damaged or not, and its indexes. Raises ContextError when unknown."""
        ...

    def close(self) -> None:
        """Lets go of the store; closing twice is allowed."""
        ...
