"""What the database asks of a store, and the words both use. Nothing here knows of files."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from alaya_jax.at_rest import STORE_DTYPES, row_bytes
from alaya_jax.errors import RequestError
from alaya_jax.show import Table
from alaya_jax.storage import identity
from alaya_jax.units import nbytes

if TYPE_CHECKING:
    from alaya_jax.cache.tiers import Leaves

Source = Callable[[int], Iterable[tuple[Any, Any]]]
"""Keys and values to be stored: called with the first token that is wanted, it gives (k, v) of the
tokens from there on, each [K, n - first, D], layer by layer from 0; only one needs to be in memory.
In a context of a `store_dtype` they are coded: rows u8 [K, n - first, D + 2], see `at_rest`. A
store keeps and moves rows, and never looks into them.
"""

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
      store_dtype: "int8" or "fp8", in which they are at rest; "": as they were computed. What is
        coded is not exact from its first token on, and its origin says so.
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
    store_dtype: str = ""
    namespace: str = ""
    title: str = ""

    def __post_init__(self):
        pairs = tuple((int(first), str(plan)) for first, plan in self.origin)  # JSON has lists
        object.__setattr__(self, "origin", pairs)
        if self.dtype not in DTYPES:
            raise RequestError(f"context: dtype={self.dtype!r}; use one of {', '.join(DTYPES)}")
        if self.store_dtype not in ("", *STORE_DTYPES):
            known = ", ".join(STORE_DTYPES)
            raise RequestError(f"context: store_dtype={self.store_dtype!r}; use one of {known}")
        if self.store_dtype and not (pairs and pairs[0][0] == 0):
            raise RequestError(
                f"context: keys and values in {self.store_dtype} are not exact; begin origin at "
                "token 0"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (isinstance(value, int) and value > 0):
                raise RequestError(f"context: {field.name}={value!r}; use a count from 1")
            if field.type is str and not isinstance(value, str):
                raise RequestError(f"context: {field.name}={value!r}; use a string")

    @property
    def row_dtype(self) -> np.dtype:
        """Of the numbers at rest: bytes, where they are coded."""
        return np.dtype(np.uint8) if self.store_dtype else DTYPES[self.dtype]

    @property
    def row_width(self) -> int:
        """How many numbers a token and kv head has at rest: D, or the bytes of a row."""
        return row_bytes(self.head_dim) if self.store_dtype else self.head_dim

    @property
    def plain(self) -> dict[str, Any]:
        """The fields as plain data. What is not coded says nothing of it: as it was before there
        were codes, and under the same names.
        """
        fields = dataclasses.asdict(self)
        if not self.store_dtype:
            del fields["store_dtype"]
        return fields

    @property
    def family(self) -> str:
        """Names all but tokens, origin and title: contexts that share it may share pages."""
        return identity.digest(identity.encoded(self._named))

    def context_id(self, tokens: np.ndarray) -> str:
        """The name of `tokens` [n] of this model, layout, origin and namespace; equal contexts
        share it.
        """
        named = identity.encoded((*self._named, self.origin))
        return identity.digest(named, np.ascontiguousarray(tokens, "<i4").tobytes())

    @property
    def _named(self) -> tuple[Any, ...]:
        layout = self.dtype, self.num_layers, self.num_kv_heads, self.head_dim, self.page_size
        coded = (self.store_dtype,) if self.store_dtype else ()
        return self.fingerprint, self.namespace, *layout, *coded


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextRecord:
    """One line of a store's list.

    Attributes:
      id: name of the context in its store.
      header: None when damage makes it unreadable.
      num_tokens: n; 0 when unreadable.
      created: seconds since 1970, UTC; 0 when unreadable.
      used: when last read, to the minute; as `created` where never.
      pinned: not to be removed until it is unpinned.
      problem: why the context cannot be used, and the way out; None when all looks well. Only
        `ContextStore.check` reads every byte.
    """

    id: str
    header: ContextHeader | None
    num_tokens: int
    created: float
    used: float = 0.0
    pinned: bool = False
    problem: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values at rest: 2 L K n rows."""
        h = self.header
        if h is None:
            return 0
        row = h.row_width * h.row_dtype.itemsize
        return 2 * h.num_layers * h.num_kv_heads * self.num_tokens * row


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreStats:
    """What a store holds.

    Attributes:
      contexts: how many.
      tokens: of all of them.
      bytes_held: keys and values of all contexts, each counted in full.
      bytes_shared: of these, those that are stored once for several; so much more it would be
        without sharing.
      bytes_indexes: of stored indexes.
      bytes_leaves: what the files of sketches and summaries of pages take: made again where they
        are lost.
      bytes_free: in segments, for contexts to come, in pages that no context holds; they take no
        room on the disk once `gc` ran.
      bytes_on_disk: what the files of the store really take.
      removed: contexts that are removed and whose pages somebody still reads.
    """

    contexts: int
    tokens: int
    bytes_held: int
    bytes_shared: int
    bytes_indexes: int
    bytes_leaves: int
    bytes_free: int
    bytes_on_disk: int
    removed: int

    def rows(self) -> dict[str, str]:
        """The same for people: what is counted, and how much that is."""
        rows = {
            "contexts": f"{self.contexts:,}, {self.tokens:,} tokens",
            "held": f"{nbytes(self.bytes_held)} of keys and values",
            "shared": f"{nbytes(self.bytes_shared)} of them are stored once for several",
            "indexes": nbytes(self.bytes_indexes),
            "leaves": f"{nbytes(self.bytes_leaves)} of sketches and summaries of pages",
            "on disk": nbytes(self.bytes_on_disk),
            "free": f"{nbytes(self.bytes_free)} in segments, which take no room",
        }
        if self.removed:
            rows["removed"] = f"{self.removed} contexts that are still read"
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{name:<10}{value}" for name, value in self.rows().items())

    def _repr_html_(self) -> str:
        return Table("", ("<what", "<how much"), list(self.rows().items())).to_html()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """What `ContextStore.gc` did.

    Attributes:
      contexts: removed ones whose pages became free.
      in_use: removed ones whose pages somebody still reads.
      segments: that held nothing and went.
      indexes: without a context, that went.
      bytes_before, bytes_after: on the disk.
      holes: whether the file system gave back the space of free pages; else they are only used
        again by the next contexts.
    """

    contexts: int
    in_use: int
    segments: int
    indexes: int
    bytes_before: int
    bytes_after: int
    holes: bool


class MappedContext(Protocol):
    """A stored context whose pages are read where they lie. While it is open they stay there,
    whoever removes the context; a context manager.
    """

    @property
    def name(self) -> str:
        """Of the files; those of one name hold the same pages."""
        ...

    @property
    def pages(self) -> np.ndarray:
        """The page of each Z tokens, i32 [ceil(n / Z)]: where they are on the axis P of `layer`."""
        ...

    @property
    def births(self) -> np.ndarray:
        """Which write made each of `pages`, i64: a page of another birth holds something else."""
        ...

    def layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a layer, each [K, P, Z, D], or rows of D + 2 bytes where the context
        has a `store_dtype`, read-only and mapped.

        Pages that are not in `pages` belong to others or nobody. Nothing was verified: see
        `verify`.
        """
        ...

    def verify(self, layer: int, pages: Any, asked: np.ndarray | None = None) -> int:
        """Compares pages of a layer with their checksums, each once in the life of a process.

        Args:
          layer: which.
          pages: of this context, [m].
          asked: of keys (0) and values (1), each kv head and page, whether it is to be compared,
            bool [2, K, m]; None: all are.

        Returns:
          how many bytes were not compared before.

        Raises:
          ContextError: one is damaged; it names context, layer, page and file.
          RequestError: one is not of this context.
        """
        ...

    def leaves(
        self, layer: int, made: Mapping[str, Any], arrays: Sequence[tuple[tuple[int, ...], str]]
    ) -> "Leaves | None":
        """The file of what an index knows of the pages of a layer; None where there can be none.

        Args:
          layer: which.
          made: the index, as "index", and all else that its numbers depend on beside the page;
            plain data. Others never see what is written under it.
          arrays: shape and name of the dtype of each array, without the axes [K, P].
        """
        ...

    def read_ahead(self, layer: int, pages: Any) -> None:
        """Asks the system to read pages [m] of a layer; returns at once."""
        ...

    def let_go(self, layer: int, pages: Any) -> None:
        """Gives back the memory of pages [m] of a layer; they are read again when next used. Pages
        of other contexts in the same files are taken too, and it may be closed.
        """
        ...

    def resident_bytes(self) -> int:
        """How much of this context's keys and values is in the system's memory."""
        ...

    def close(self) -> None:
        """Gives up the lease; arrays of `layer` must not be read after that."""
        ...

    def __enter__(self) -> "MappedContext": ...

    def __exit__(self, *_: object) -> None: ...


class ContextStore(Protocol):
    """Where contexts live between processes: all that a database uses of its store."""

    @property
    def path(self) -> Path:
        """Where it is, for errors."""
        ...

    def require_writable(self) -> None:
        """Raises DatabaseError when nothing can be written: closed, or open for reading only."""
        ...

    def version(self) -> Hashable:
        """Another one whenever the list may have changed, whoever changed it; cheap."""
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
        kv: Source | Iterable[tuple[Any, Any]],
        progress: Callable[[int, int], None] | None = None,
    ) -> ContextRecord:
        """Stores a context, all of it or nothing, and returns its record.

        A context already there, undamaged, is kept as it is, and `kv` is not read. Of a prefix
        that another context of the same family and origin has, the pages are shared: `kv` is
        called with the first token that is not. Writers take turns; who waits says for whom.

        Args:
          header: what the context is.
          tokens: ids [n], n > 0.
          kv: gives the keys and values, of the header's dtype, or coded, if it has a
            `store_dtype`; or all of them, (k, v) of each layer, each [K, n, D].
          progress: called as progress(layers written, L) after each layer.

        Raises:
          RequestError: tokens or kv do not have the shape or dtype that the header says.
          DatabaseError: the store is closed, read-only, full, or fails to write.
        """
        ...

    def read_kv(
        self, id: str, layer: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of tokens [start, stop) of one layer, each [K, stop - start, D]; rows of
        D + 2 bytes, where the context has a `store_dtype`.

        The arrays are read-only copies. What is returned was verified.

        Raises:
          ContextError: the context is unknown or damaged.
          RequestError: no such layer or tokens.
        """
        ...

    def mapped(self, id: str) -> MappedContext:
        """A context's pages as they lie in the store, to be read and verified piece by piece.

        Raises:
          ContextError: the context is unknown or damaged.
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
        """Arrays of one layer of an index, by name; verified, read-only and mapped.

        Raises:
          ContextError: the context or the index is unknown or damaged.
        """
        ...

    def check_index(self, id: str, kind: str) -> Sequence[str]:
        """Reads all of an index; every problem found, in words."""
        ...

    def leaves(self, id: str) -> Mapping[str, int]:
        """Bytes that are stored of what sketches and summaries know of a context's pages, by index;
        its share of pages included.
        """
        ...

    def check_leaves(self, id: str) -> Sequence[str]:
        """Reads all of these; every problem found, in words. Nothing is lost: they are made again
        when they are next asked for.
        """
        ...

    def check(self, id: str) -> Sequence[str]:
        """Reads all of a context and its indexes; every problem found, in words."""
        ...

    def remove(self, id: str) -> None:
        """Deletes a context, damaged or not, and its indexes. Who reads its pages goes on.

        Raises:
          ContextError: it is unknown, or pinned.
        """
        ...

    def pin(self, id: str, pinned: bool = True) -> None:
        """Keeps a context from being removed, or no longer. Raises ContextError when unknown."""
        ...

    def gc(self) -> Collected:
        """Frees what nobody holds, and gives the space back to the file system."""
        ...

    def stats(self) -> StoreStats:
        """Counts contexts and bytes."""
        ...

    def close(self) -> None:
        """Lets go of the store; closing twice is allowed."""
        ...
