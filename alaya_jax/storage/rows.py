"""What the rows of a store's catalogue say: contexts, indexes, damage, segments. Each is plain data
under a checksum, and is looked at like a stranger's: types, ranges, names.
"""

import dataclasses
import json
import re
import time
from typing import Any

import numpy as np

from alaya_jax.at_rest import STORE_DTYPES, row_bytes
from alaya_jax.storage import checksums
from alaya_jax.storage.interface import DTYPES, ContextHeader, ContextRecord

_ID = re.compile(r"[0-9a-f]{24}")
_NAME = re.compile(r"[0-9a-f]{16}")


class BadRow(ValueError):
    """A row that does not say what it must."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What a segment's files hold: pages [K, P, Z, D] of each of L layers.

    Attributes:
      dtype: of keys and values.
      num_layers, num_kv_heads, num_pages, page_size, head_dim: L, K, P, Z, D.
      store_dtype: what they are coded in; "": not at all.
    """

    dtype: str
    num_layers: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    num_pages: int
    store_dtype: str = ""

    def __post_init__(self):
        _require(self.dtype in DTYPES, "dtype")
        _require(self.store_dtype in ("", *STORE_DTYPES), "store_dtype")
        for name in ("num_layers", "num_kv_heads", "page_size", "head_dim", "num_pages"):
            _require(_is_count(getattr(self, name)) and getattr(self, name) > 0, name)
        _require(self.num_pages < 2**31, "num_pages")

    @property
    def piece(self) -> int:
        """Bytes of a page's keys of one layer and kv head."""
        return int(np.prod(self.shape[2:])) * self.row_dtype.itemsize

    @property
    def row_dtype(self) -> np.dtype:
        """See `ContextHeader.row_dtype`."""
        return np.dtype(np.uint8) if self.store_dtype else DTYPES[self.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """[K, P, Z, D], of bytes [K, P, Z, D + 2] where they are coded."""
        width = row_bytes(self.head_dim) if self.store_dtype else self.head_dim
        return self.num_kv_heads, self.num_pages, self.page_size, width

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: keys and values of all layers and kv heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.piece

    @property
    def file_bytes(self) -> int:
        """Length of a file of one layer and kind."""
        return self.num_kv_heads * self.num_pages * self.piece

    def holds(self, header: ContextHeader) -> bool:
        """Whether a context's pages can lie in it."""
        return all(
            getattr(self, f.name) == getattr(header, f.name)
            for f in dataclasses.fields(self)
            if f.name != "num_pages"
        )

    @classmethod
    def of(cls, header: ContextHeader, num_pages: int) -> "Layout":
        """A context's, with room for so many pages."""
        names = [f.name for f in dataclasses.fields(cls) if f.name != "num_pages"]
        return cls(num_pages=num_pages, **{name: getattr(header, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A stored context.

    Attributes:
      serial: of this act of storing it; another one when it is stored again.
      id, header, num_tokens, created, used, pinned: see `ContextRecord`.
      removed: it is no longer there, but somebody may read its pages.
      segment: where its pages are.
      tokens, pages: checksums of its lists.
    """

    serial: int
    id: str
    header: ContextHeader
    num_tokens: int
    created: float
    used: float
    pinned: bool
    removed: bool
    segment: int
    tokens: int
    pages: int

    def __post_init__(self):
        _require(_is_count(self.serial), "serial")
        _require(isinstance(self.id, str) and _ID.fullmatch(self.id) is not None, "id")
        _require(isinstance(self.header, ContextHeader), "header")
        _require(_is_count(self.num_tokens) and 0 < self.num_tokens < 2**31, "num_tokens")
        for name in ("created", "used"):
            _require(isinstance(getattr(self, name), float), name)
        for name in ("pinned", "removed"):
            _require(isinstance(getattr(self, name), bool), name)
        for name in ("segment", "tokens", "pages"):
            _require(_is_count(getattr(self, name)), name)

    @classmethod
    def new(
        cls,
        serial: int,
        id: str,
        header: ContextHeader,
        tokens: np.ndarray,
        segment: int,
        pages: "PageList",
    ) -> tuple["Entry", tuple[bytes, bytes]]:
        """The row of a context that is stored now, and its lists as bytes: tokens, pages."""
        lists = tokens.astype("<i4").tobytes(), pages.to_bytes()
        now = time.time()
        made = cls(
            serial=serial,
            id=id,
            header=header,
            num_tokens=len(tokens),
            created=now,
            used=now,
            pinned=False,
            removed=False,
            segment=segment,
            tokens=checksums.of_bytes(lists[0]) >> 1,
            pages=checksums.of_bytes(lists[1]) >> 1,
        )
        return made, lists

    @property
    def num_pages(self) -> int:
        """ceil(n / Z)."""
        return -(-self.num_tokens // self.header.page_size)

    @property
    def record(self) -> ContextRecord:
        """For the list."""
        return ContextRecord(
            id=self.id,
            header=self.header,
            num_tokens=self.num_tokens,
            created=self.created,
            used=self.used,
            pinned=self.pinned,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """A stored index.

    Attributes:
      serial: of its context.
      kind: its name there.
      name: of its directory.
      meta: checksum of the file there that vouches for the others.
    """

    serial: int
    kind: str
    name: str
    meta: int

    def __post_init__(self):
        _require(_is_count(self.serial) and _is_count(self.meta), "serial")
        _require(isinstance(self.kind, str) and self.kind.isidentifier(), "kind")
        _require(isinstance(self.name, str) and _NAME.fullmatch(self.name) is not None, "name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Damage:
    """A page that was found not to match its checksum: no other context is to share it.

    Attributes:
      segment, slot: where it is.
      birth: the serial of the write that made it.
    """

    segment: int
    slot: int
    birth: int

    def __post_init__(self):
        _require(all(map(_is_count, dataclasses.astuple(self))), "numbers")


@dataclasses.dataclass(frozen=True)
class PageList:
    """The pages of a context.

    Attributes:
      slots: in its segment, i32 [n].
      births: the serial of the write that made each, i64 [n]; its own, or that of a context that
        shares the page.
    """

    slots: np.ndarray
    births: np.ndarray

    def __len__(self) -> int:
        return len(self.slots)

    def to_bytes(self) -> bytes:
        """For the catalogue."""
        return self.slots.astype("<i4").tobytes() + self.births.astype("<i8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, count: int, num_slots: int) -> "PageList":
        """Of `count` pages in a segment of `num_slots`.

        Raises:
          BadRow: it is something else.
        """
        _require(len(data) == 12 * count, "pages")
        slots = np.frombuffer(data, "<i4", count).astype(np.int32)
        births = np.frombuffer(data, "<i8", count, 4 * count).astype(np.int64)
        inside = bool((slots >= 0).all() and (slots < num_slots).all())
        _require(inside and len(np.unique(slots)) == count, "pages")
        return cls(slots, births)


def facts(row: Any) -> bytes:
    """What a row of the catalogue says, but for its key."""
    said = dataclasses.asdict(row)
    if isinstance(row, Entry):
        del said["serial"]
        said["header"] = row.header.plain
    if isinstance(row, Layout) and not row.store_dtype:
        del said["store_dtype"]  # see `ContextHeader.plain`
    return json.dumps(said, sort_keys=True).encode()


def entry(key: int, said: bytes) -> Entry:
    """A context of its row's key and facts. Raises BadRow."""
    data = _plain(said)
    try:
        return Entry(serial=key, header=ContextHeader(**data.pop("header")), **data)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise BadRow(str(error)) from error


def row[T: Layout | IndexEntry | Damage](kind: type[T], said: bytes) -> T:
    """Any other row. Raises BadRow."""
    try:
        return kind(**_plain(said))
    except TypeError as error:
        raise BadRow(str(error)) from error


def checksum(table: str, key: int, said: bytes) -> int:
    """Of a row: 62 bits, so that SQLite's whole numbers hold a few of them added up."""
    return checksums.of_bytes(table.encode() + key.to_bytes(8, "little", signed=True) + said) >> 2


def _plain(said: bytes) -> dict[str, Any]:
    try:
        data = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise BadRow(str(error)) from error
    _require(isinstance(data, dict), "facts")
    return data


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _require(right: bool, what: str) -> None:
    if not right:
        raise BadRow(f"{what} is out of range")
