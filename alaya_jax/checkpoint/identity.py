"""Which model a checkpoint is: a digest of its config and of every byte of its weights.

The bytes are read for it once. What was found is kept in the cache directory beside the state of
the files (size, times, inode), and holds until one of them changes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from alaya_jax.checkpoint.bundled import cache_directory
from alaya_jax.checkpoint.processes import first_says
from alaya_jax.checkpoint.source import Piece, Source, StoredTensor, release
from alaya_jax.errors import RequestError
from alaya_jax.models.config import LlamaConfig

_STEP = 1 << 24  # bytes read at once
_WORTH = 1 << 26  # bytes from which on their digests are kept: fewer are read in no time
_SETTLED = 2.0  # seconds: a file younger than that when opened may be another by now
_READERS = max(1, min(8, (os.cpu_count() or 1) // 2))  # the others load what is being read
_MARK = "v2-"  # of all bytes; what has none is of samples, see `storage.sampled`


@dataclasses.dataclass(frozen=True)
class Digest:
    """What the fingerprint takes of a piece: what it is, and the sha256 (hex) of its bytes."""

    name: str
    shape: tuple[int, ...]
    stored_dtype: str
    nbytes: int
    sha256: str


def fingerprint(config: LlamaConfig, digests: Iterable[Digest]) -> str:
    """Identity of a model's weights, 64 characters.

    Returns:
      a mark, and behind it the first digits of the sha256 over the config and each digest in order
      of name. Contexts stored before all bytes were read have fingerprints without the mark.
    """
    whole = hashlib.sha256(json.dumps(config.in_digest(), sort_keys=True).encode())
    for digest in sorted(digests, key=lambda d: d.name):
        whole.update(json.dumps(dataclasses.astuple(digest)).encode())
    return (_MARK + whole.hexdigest())[:64]


def identify(
    source: Source,
    tensors: Iterable[StoredTensor],
    *,
    advance: Callable[[int], None] = lambda count: None,
    stop: threading.Event | None = None,
) -> str:
    """The fingerprint of an opened checkpoint, from every stored byte.

    Args:
      source: the checkpoint.
      tensors: the tensors of its parameters.
      advance: called with the number of bytes read; not at all where the digests are known.
      stop: ends it early.

    Raises:
      CancelledError: `stop` was set.
    """
    pieces = source.pieces
    if pieces is None:
        pieces = tuple(
            Piece(t.name, t.shape, t.stored_dtype, t.file, t.data)
            for t in tensors
            if t.data is not None
        )
    digests = _digests(source, pieces, advance, stop or threading.Event())
    if source.stated is not None and source.stated[1] == seal_of(digests):
        return source.stated[0]
    return fingerprint(source.config, digests)


def seal_of(digests: Iterable[Digest]) -> str:
    """One sha256 (hex) for files: that of their names and digests."""
    lines = sorted(f"{digest.name} {digest.sha256}\n" for digest in digests)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextlib.contextmanager
def identified(
    source: Source, tensors: Sequence[StoredTensor], mesh: Mesh | None
) -> Iterator[Callable[[], str]]:
    """Identifies a checkpoint while the block runs; yields a function that waits for the
    fingerprint.

    Over a mesh of several processes the first one reads, and tells the others.
    """
    stop = threading.Event()
    shared = mesh is not None and len({d.process_index for d in mesh.devices.flat}) > 1
    with ThreadPoolExecutor(1) as thread:
        try:
            if shared and jax.process_index() != 0:
                yield lambda: first_says(lambda: "")
            else:
                found = thread.submit(identify, source, tensors, stop=stop)
                yield (lambda: first_says(found.result)) if shared else found.result
        except BaseException:
            stop.set()
            raise


def digest_pieces(
    pieces: Iterable[Piece],
    advance: Callable[[int], None] = lambda count: None,
    stop: threading.Event | None = None,
) -> list[Digest]:
    """Reads all bytes of some pieces, several at a time, and gives their memory back."""

    def read(piece: Piece) -> Digest:
        found = hashlib.sha256()
        for start in range(0, piece.data.size, _STEP):
            if stop is not None and stop.is_set():
                raise CancelledError
            part = piece.data[start : start + _STEP]
            found.update(part)
            release(part)
            advance(part.size)
        named = piece.name, piece.shape, piece.stored_dtype
        return Digest(*named, piece.data.size, found.hexdigest())

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(read, pieces))


def _digests(
    source: Source,
    pieces: Sequence[Piece],
    advance: Callable[[int], None],
    stop: threading.Event,
) -> list[Digest]:
    """The digests of all pieces of a checkpoint: those that are known, or new ones."""
    if sum(piece.data.size for piece in pieces) < _WORTH:
        return digest_pieces(pieces, advance, stop)
    name = hashlib.sha256(os.fsencode(source.path)).hexdigest()[:24]
    kept = cache_directory() / "fingerprints" / f"{name}.json"
    files = {str(piece.file) for piece in pieces}
    state = _state(files)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["files"] == state:
            return [
                Digest(p.name, p.shape, p.stored_dtype, p.data.size, known["sha256"][p.name])
                for p in pieces
            ]
    digests = digest_pieces(pieces, advance, stop)
    newest = max(max(times) for _, *times, _ in state.values()) / 1e9
    if _state(files) == state and source.opened - newest > _SETTLED:
        content = {"path": str(source.path), "files": state}
        content["sha256"] = {digest.name: digest.sha256 for digest in digests}
        part = kept.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):  # then they are read again the next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(content), encoding="utf-8")
            part.replace(kept)
    return digests


def _state(files: Iterable[str]) -> dict[str, list[int]]:
    """By file: size, time of its last write, of its last change, inode."""
    stats = {file: os.stat(file) for file in files}
    return {f: [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for f, s in stats.items()}


def identify_arrays(config: LlamaConfig, params: Any) -> str:
    """The fingerprint of parameters in memory: of any tree, quantized and adapted kernels too.

    It differs from that of a file with the same numbers, which lie in another order there.

    Raises:
      RequestError: they are spread over several processes.
    """
    leaves, tree = jax.tree.flatten_with_path(params)

    def read(item: tuple[Any, Any]) -> Digest:
        keys, leaf = item
        values = np.ascontiguousarray(_on_host(leaf))
        found = hashlib.sha256(values.reshape(-1).view(np.uint8)).hexdigest()
        return Digest(
            jax.tree_util.keystr(keys), values.shape, str(values.dtype), values.nbytes, found
        )

    with ThreadPoolExecutor(_READERS) as readers:
        digests = list(readers.map(read, leaves))
    # What a matrix of another kind holds beside its arrays (an adapter's scale) is in the tree.
    return fingerprint(config, [*digests, Digest("", (), "", 0, str(tree))])


def _on_host(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)
    if not leaf.is_fully_addressable:
        raise RequestError(
            "parameters that are spread over several processes get no fingerprint of their own; "
            "name them: Model(config, params, fingerprint=...)"
        )
    # An array keeps what was copied to the host; one of our own is gone with it.
    shards = [shard.data for shard in leaf.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards))
