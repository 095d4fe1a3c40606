"""Reads the chunks of a context from an object store, as far as a database does not have them."""

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator

import numpy as np

from alaya_jax.errors import ContextError, DatabaseError
from alaya_jax.storage import objects, sampled
from alaya_jax.storage.in_flight import MOST, Advance, ahead, window, workers
from alaya_jax.storage.interface import ContextRecord, ContextStore
from alaya_jax.storage.object_store import ObjectStore, damaged
from alaya_jax.storage.objects import CHUNK, MovedContext


def local_prefix(
    place: ObjectStore,
    store: ContextStore,
    moved: MovedContext,
    n: int,
    without: ContextRecord | None,
) -> tuple[str | None, int]:
    """The local context that shares most chunks of the first n tokens, and how many tokens these
    have; its tokens are compared with those in the chunks, and not the names alone.

    Args:
      place: where the chunks are.
      store: the database.
      moved, n: the context that is wanted, and how much of it.
      without: a context of the database that is not looked at.
    """
    best, most = None, 0
    for record in store.list(moved.header.namespace):
        header = record.header
        if header is None or sampled.named(record).problem is not None or record == without:
            continue
        if objects.group(header) != objects.group(moved.header):
            continue
        try:
            tokens = store.tokens(record.id)
        except ContextError:
            continue  # damaged, as its own check says; the others serve
        names = objects.chunk_names(header, tokens)
        shared = min(objects.shared_chunks(names, moved.chunks), -(-n // CHUNK))
        if shared > most and (same := _compared(place, moved, tokens, shared)) > most:
            best, most = record.id, same
    return best, min(most * CHUNK, n)


def _compared(place: ObjectStore, moved: MovedContext, tokens: np.ndarray, count: int) -> int:
    """How many of the first chunks have these tokens inside."""
    spans = moved.spans()

    def same(i: int) -> bool:
        span = spans[i]
        want = objects.chunk_heading(moved.header, span.start, tokens[span])
        return place.begins(objects.chunk_key(moved.chunks[i]), len(want)) == want

    with workers() as pool:
        found = list(ahead(pool, ((same, i) for i in range(count)), MOST))
    return found.index(False) if False in found else count


def pull_chunks(
    place: ObjectStore,
    moved: MovedContext,
    tokens: np.ndarray,
    start: int,
    numbers: np.ndarray,
    advance: Advance,
) -> list[int]:
    """Reads chunks from the token `start` on, verifies them, and fills in what they hold.

    Args:
      place: where they are.
      moved: the context.
      tokens: its ids, [n]; the first `start` are known.
      start: a whole number of chunks.
      numbers: for keys and values, [L, 2, K, n - start, D].
      advance: told of the bytes of keys and values that are read.

    Returns:
      the bytes of each object that was read.

    Raises:
      ContextError: a chunk is gone, damaged or of something else.
      RemoteError: see `ObjectStore`.
    """
    header, spans = moved.header, moved.spans()
    first, last = start // CHUNK, -(-len(tokens) // CHUNK)

    def get(i: int) -> tuple[np.ndarray, np.ndarray, int]:
        span, key = spans[i], objects.chunk_key(moved.chunks[i])
        found = place.read(key)
        if found is None:
            raise ContextError(damaged(place, key, f"it is gone, and context {moved.id} needs it"))
        parent = moved.chunks[i - 1] if i else ""
        try:
            ids, kv = objects.read_chunk(found.data, header, span.start, span.stop - span.start)
            if objects.chunk_name(header, parent, span.start, ids) != moved.chunks[i]:
                raise ContextError("its tokens are not those of its name")
        except ContextError as error:
            raise ContextError(damaged(place, key, str(error))) from error
        return ids, kv, len(found.data)

    read = []
    with workers() as pool:
        jobs = ((get, i) for i in range(first, last))
        got = ahead(pool, jobs, window(objects.chunk_nbytes(header, 0, CHUNK)))
        for i, (ids, kv, nbytes) in zip(range(first, last), got, strict=True):
            span = spans[i]
            tokens[span] = ids
            numbers[..., span.start - start : span.stop - start, :] = kv
            read.append(nbytes)
            advance(moved.span_nbytes(span))
    return read


@contextlib.contextmanager
def gathered(store: ContextStore, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[np.ndarray]:
    """An array in a file without a name beside the database, gone when it is done with."""
    count = int(np.prod(shape))
    size = max(1, count * dtype.itemsize)  # no file of nothing can be mapped
    try:
        with tempfile.TemporaryFile(dir=store.path) as file:
            if hasattr(os, "posix_fallocate"):  # else a full disk kills the process
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            raw = np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)
            yield raw[: count * dtype.itemsize].view(dtype).reshape(shape)
    except OSError as error:
        raise DatabaseError(
            f"gathering {size:,} bytes of a context in {store.path} failed: {error}; make room, "
            "or put the database on another disk"
        ) from error
