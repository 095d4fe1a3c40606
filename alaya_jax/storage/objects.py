r"""A context as immutable objects that can be moved: their names and their bytes.

A chunk is 256 tokens (the last of a context: fewer), all layers, keys and values:

    alaya chunk 1\n           what this is, and its version
    u32, JSON                 the chunk's description: layout, axes by name, whose numbers they are
    i32 [T]                   its tokens
    [L, 2, K, T, D]           keys 0 and values 1, as the description says, little-endian
    SHA-256                   of all bytes before

Its name hashes the name of the chunk before it, its tokens and its description, each with its
length in front, so that no two differ by where one ends and the next begins. Everything that
changes numbers is in there: the fingerprint of the model (weights and RoPE), dtype, layout, page
size, origin and namespace. A reader knows what the description must say, and compares bytes: it
interprets nothing that it did not write itself.

A record says which chunks a context is; it is JSON under a checksum, written last.
"""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage.interface import ContextHeader, ContextRecord

CHUNK = 256
"""Tokens of a chunk."""

AXES = ("layer", "key_value", "kv_head", "token", "head_dim")
"""Of a chunk's numbers; two of equal length cannot be taken for each other."""

DIGEST = 32
"""Bytes of a SHA-256, at the end of chunks and records."""

_CHUNK = b"alaya chunk 1\n"
_RECORD = b"alaya record 1\n"


def digest(*parts: bytes) -> str:
    """The hash of some parts, each with its length in front: a name."""
    found = hashlib.sha256()
    for part in parts:
        found.update(struct.pack("<Q", len(part)))
        found.update(part)
    return found.hexdigest()


def group(header: ContextHeader) -> str:
    """The name of all contexts of one model, layout, page size and namespace."""
    return digest(b"alaya group 1", _json(_identity(header)))


def chunk_stops(num_tokens: int) -> list[int]:
    """Where the chunks of a context end."""
    return [min(first + CHUNK, num_tokens) for first in range(0, num_tokens, CHUNK)]


def chunk_key(name: str) -> str:
    """Where the chunk of a name is."""
    return f"chunks/{name[:2]}/{name}"


def chunk_names(header: ContextHeader, tokens: np.ndarray) -> list[str]:
    """The names of a context's chunks; equal as far as its tokens and their origin are.

    Args:
      header: what the context is.
      tokens: its ids, [n].
    """
    names, parent = [], ""
    for i, stop in enumerate(chunk_stops(len(tokens))):
        parent = chunk_name(header, parent, i * CHUNK, tokens[i * CHUNK : stop])
        names.append(parent)
    return names


def chunk_name(header: ContextHeader, parent: str, first: int, tokens: np.ndarray) -> str:
    """The name of one chunk.

    Args:
      header: of the context.
      parent: name of the chunk before it; "" of the first.
      first: position of its first token.
      tokens: its ids, [T].
    """
    told = _description(header, first, len(tokens))
    return digest(b"alaya chunk 1", parent.encode(), told, _bytes_of(tokens))


def chunk_heading(header: ContextHeader, first: int, tokens: np.ndarray) -> bytes:
    """What a chunk's object begins with, up to its numbers."""
    told = _description(header, first, len(tokens))
    return b"".join((_CHUNK, struct.pack("<I", len(told)), told, _bytes_of(tokens)))


def chunk_shape(header: ContextHeader, count: int) -> tuple[int, ...]:
    """L, 2, K, T, D of a chunk of `count` tokens; D + 2 bytes, where they are coded."""
    return (header.num_layers, 2, header.num_kv_heads, count, header.row_width)


def chunk_nbytes(header: ContextHeader, first: int, count: int) -> int:
    """The size of a chunk's object."""
    heading = len(chunk_heading(header, first, np.zeros(count, np.int32)))
    numbers = int(np.prod(chunk_shape(header, count))) * header.row_dtype.itemsize
    return heading + numbers + DIGEST


def shared_chunks(mine: Iterable[str], theirs: Iterable[str]) -> int:
    """How many chunks two contexts have in common, from the first on, by their names."""
    count = 0
    for one, other in zip(mine, theirs, strict=False):
        if one != other:
            break
        count += 1
    return count


def write_chunk(
    header: ContextHeader, first: int, tokens: np.ndarray, numbers: np.ndarray
) -> bytes:
    """The object of a chunk.

    Args:
      header: of the context.
      first: position of its first token.
      tokens: its ids, [T].
      numbers: keys and values, [L, 2, K, T, D].
    """
    raw = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
    return _sealed(chunk_heading(header, first, tokens), raw.data)


def read_chunk(
    data: bytes, header: ContextHeader, first: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens and the numbers of a chunk's object, views of it, if it is what it should be.

    Args:
      data: the object.
      header: of the context, as its record says.
      first, count: position and number of its tokens.

    Returns:
      i32 [T], and [L, 2, K, T, D].

    Raises:
      ContextError: it is damaged, or of another model, layout, place or version.
    """
    want = chunk_heading(header, first, np.zeros(count, np.int32))
    at = len(want) - 4 * count
    if not data.startswith(_CHUNK):
        raise ContextError("it is no chunk that this alaya_jax can read")
    if len(data) != chunk_nbytes(header, first, count):
        whole = chunk_nbytes(header, first, count)
        raise ContextError(f"it has {len(data):,} bytes instead of {whole:,}")
    if not _is_sealed(data):
        raise ContextError("it does not match its checksum")
    if data[:at] != want[:at]:
        raise ContextError("it is of another model, layout or place")
    tokens = np.frombuffer(data, "<i4", count, at)
    raw = np.frombuffer(data, np.uint8, len(data) - len(want) - DIGEST, len(want))
    return tokens, raw.view(header.row_dtype).reshape(chunk_shape(header, count))


def is_whole_chunk(data: bytes) -> bool:
    """Whether an object is some chunk, as it was written."""
    return data.startswith(_CHUNK) and _is_sealed(data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovedContext:
    """The record of a context outside of its database.

    Attributes:
      id: what databases call it.
      header: what it is.
      num_tokens: n.
      created: seconds since 1970, UTC.
      chunks: their names, in order.
    """

    id: str
    header: ContextHeader
    num_tokens: int
    created: float
    chunks: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.of_prefix(self.num_tokens).nbytes

    def spans(self) -> list[slice]:
        """The tokens of each chunk."""
        stops = chunk_stops(self.num_tokens)
        return [slice(i * CHUNK, stop) for i, stop in enumerate(stops)]

    def span_nbytes(self, span: slice) -> int:
        """Bytes of the keys and values of some tokens."""
        return self.of_prefix(span.stop).nbytes - self.of_prefix(span.start).nbytes

    def of_prefix(self, length: int) -> ContextRecord:
        """What a database would say of its first tokens."""
        return ContextRecord(
            id=self.id, header=self.header, num_tokens=length, created=self.created
        )


def write_record(moved: MovedContext) -> bytes:
    """The object of a record."""
    return _sealed(_RECORD, _json(dataclasses.asdict(moved) | {"header": moved.header.plain}))


def read_record(data: bytes) -> MovedContext:
    """The record in an object.

    Raises:
      ContextError: it is damaged, or of another version, or contradicts itself.
    """
    fields = read_plain(data, _RECORD)
    try:
        moved = MovedContext(
            id=fields["id"],
            header=ContextHeader(**fields["header"]),
            num_tokens=fields["num_tokens"],
            created=float(fields["created"]),
            chunks=tuple(fields["chunks"]),
        )
        if not (type(moved.num_tokens) is int and moved.num_tokens > 0):
            raise ValueError(f"num_tokens={moved.num_tokens!r}")
        if len(moved.chunks) != -(-moved.num_tokens // CHUNK):
            raise ValueError(f"{moved.num_tokens} tokens in {len(moved.chunks)} chunks")
        if not all(map(is_name, moved.chunks)) or not is_id(moved.id):
            raise ValueError("names that are none")
    except (ValueError, LookupError, TypeError, AttributeError, RequestError) as error:
        raise ContextError(f"it cannot be understood ({error})") from error
    return moved


def write_plain(mark: bytes, fields: Mapping[str, Any]) -> bytes:
    """Plain data as an object, under a mark that says what and which version it is."""
    return _sealed(mark, _json(fields))


def read_plain(data: bytes, mark: bytes) -> dict[str, Any]:
    """The plain data of an object; ContextError where it is damaged."""
    if not data.startswith(mark):
        raise ContextError(f"it does not begin with {mark.decode().strip()!r}")
    if not _is_sealed(data):
        raise ContextError("it does not match its checksum")
    try:
        fields = json.loads(data[len(mark) : -DIGEST])
    except (ValueError, RecursionError) as error:
        raise ContextError(f"it cannot be understood ({error})") from error
    if not isinstance(fields, dict):
        raise ContextError("it cannot be understood")
    return fields


def is_name(text: Any) -> bool:
    """Whether it is a name as `digest` makes them."""
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def is_id(text: Any) -> bool:
    """Whether it can be a context's id: hexadecimal, and so never a path."""
    return isinstance(text, str) and 0 < len(text) <= 64 and set(text) <= set("0123456789abcdef")


def _identity(header: ContextHeader) -> dict[str, Any]:
    fields = header.plain
    del fields["title"], fields["origin"]
    return fields


def _description(header: ContextHeader, first: int, count: int) -> bytes:
    """All that changes a chunk's numbers beside its tokens and those before, as JSON."""
    shape = list(zip(AXES, chunk_shape(header, count), strict=True))
    origin = [run for run in header.origin if run[0] < first + count]
    return _json(_identity(header) | {"first": first, "axes": shape, "origin": origin})


def _json(fields: Any) -> bytes:
    """Equal data give equal bytes."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def _bytes_of(tokens: np.ndarray) -> bytes:
    return np.ascontiguousarray(tokens, "<i4").tobytes()


def _sealed(*parts: Any) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return b"".join((*parts, found.digest()))


def _is_sealed(data: bytes) -> bool:
    body = memoryview(data)[:-DIGEST]
    return len(data) >= DIGEST and hashlib.sha256(body).digest() == data[-DIGEST:]
