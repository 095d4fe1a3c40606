"""Writes the chunks of a context to an object store, as far as they are not there."""

from collections.abc import Iterator

import numpy as np

from alaya_jax.errors import ContextError
from alaya_jax.storage import objects
from alaya_jax.storage.in_flight import MOST, Advance, ahead, window, workers
from alaya_jax.storage.interface import ContextStore
from alaya_jax.storage.object_store import ObjectStore
from alaya_jax.storage.objects import CHUNK, MovedContext

READ = 4
"""Chunks that are read from the database at a time: short reads cost more."""


def push_chunks(
    place: ObjectStore,
    store: ContextStore,
    moved: MovedContext,
    tokens: np.ndarray,
    repair: bool,
    advance: Advance,
) -> tuple[int, int]:
    """Writes the chunks that are not there; how many, and their bytes.

    Args:
      place: where to.
      store, moved, tokens: where from; a context of it, and its ids, [n].
      repair: read what is there, and write anew what is damaged.
      advance: told of the bytes of keys and values that are there or written.

    Raises:
      ContextError: a name holds something else; or the local context is damaged.
      RemoteError: see `ObjectStore`.
    """
    header = moved.header
    spans = moved.spans()

    def look(i: int) -> bytes | None:
        """None where the chunk is there, and the version to replace (b"" for none) else."""
        span = spans[i]
        want = objects.chunk_heading(header, span.start, tokens[span])
        key = objects.chunk_key(moved.chunks[i])
        if not repair:
            begins = place.begins(key, len(want))
            if begins is None or begins == want:
                return b"" if begins is None else None
        there = place.read(key)
        if there is None:
            return b""
        if objects.is_whole_chunk(there.data):
            if there.data.startswith(want):
                return None
            raise ContextError(
                f"{place.where}: {key} holds other tokens, or the keys of another model, than "
                f"context {moved.id} has under that name; push to another place"
            )
        return there.version

    def put(i: int, version: bytes, numbers: np.ndarray) -> int:
        span = spans[i]
        data = objects.write_chunk(header, span.start, tokens[span], numbers)
        key = objects.chunk_key(moved.chunks[i])
        if version:
            place.replace(key, data, version)
        else:
            place.put(key, data)  # False: another push was faster
        return len(data)

    def read(run: list[int]) -> list[np.ndarray]:
        return _read_chunks(store, moved, [spans[i] for i in run])

    written = nbytes = 0
    with workers() as pool:
        missing = []
        looked = ahead(pool, ((look, i) for i in range(len(spans))), MOST)
        for i, version in enumerate(looked):
            if version is None:
                advance(moved.span_nbytes(spans[i]))
            else:
                missing.append((i, version))
        at_a_time = window(objects.chunk_nbytes(header, 0, CHUNK))
        jobs = (
            (put, i, version, numbers)
            for run in _runs(missing, min(READ, at_a_time))
            for (i, version), numbers in zip(run, read([i for i, _ in run]), strict=True)
        )
        for (i, _), count in zip(missing, ahead(pool, jobs, at_a_time), strict=True):
            written, nbytes = written + 1, nbytes + count
            advance(moved.span_nbytes(spans[i]))
    return written, nbytes


def _runs[V](missing: list[tuple[int, V]], most: int) -> Iterator[list[tuple[int, V]]]:
    """Stretches of chunks that follow one another, of at most so many."""
    run: list[tuple[int, V]] = []
    for chunk in missing:
        if run and (len(run) == most or chunk[0] != run[-1][0] + 1):
            yield run
            run = []
        run.append(chunk)
    if run:
        yield run


def _read_chunks(store: ContextStore, moved: MovedContext, spans: list[slice]) -> list[np.ndarray]:
    """Keys and values of chunks that follow one another, of a local context, [L, 2, K, T, D]."""
    header = moved.header
    shapes = [objects.chunk_shape(header, span.stop - span.start) for span in spans]
    chunks = [np.empty(shape, header.row_dtype) for shape in shapes]
    start, stop = spans[0].start, spans[-1].stop
    for layer in range(header.num_layers):
        for half, numbers in enumerate(store.read_kv(moved.id, layer, start, stop)):
            for chunk, span in zip(chunks, spans, strict=True):
                chunk[layer, half] = numbers[:, span.start - start : span.stop - start]
    return chunks
