"""Conversion between checkpoint formats: one tensor at a time, whole or not at all.

The result grows in a hidden directory beside the destination. When every file is on the disk and
opens as the model it should be, that directory is renamed; before, the destination does not exist.
What a killed conversion leaves is continued with `resume=True`, and ends in the same bytes.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from alaya_jax.checkpoint import gguf_write, hf_write, orbax
from alaya_jax.checkpoint.gguf import open_gguf
from alaya_jax.checkpoint.gguf_tokenizer import same_ids
from alaya_jax.checkpoint.hf import open_hf
from alaya_jax.checkpoint.identity import Digest, fingerprint, identify
from alaya_jax.checkpoint.names import Entry
from alaya_jax.checkpoint.params import match
from alaya_jax.checkpoint.processes import first_does, whole
from alaya_jax.checkpoint.source import Source, StoredTensor, absolute
from alaya_jax.checkpoint.weights import KINDS, Weight
from alaya_jax.errors import CheckpointError, ConfigError
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.tokenizer import Tokenizer
from alaya_jax.progress import progress_bar
from alaya_jax.sharding import ShardingRules

Target = Literal["hf", "orbax", "gguf-f16", "gguf-bf16", "gguf-f32"]
SHARD_SIZE = "5GB"
PROMPT = (
    "The quick brown fox jumps over the lazy dog. 3.14159 = π; naïve café, 你好 🙂\n\tdef f(x):"
)
_JOB = ".conversion.json"
_MEMORY = Path("the parameters in memory")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      source, path: where the model was and is.
      to: format of the result.
      dtype: type of its matrices.
      tensors: number of arrays.
      nbytes: bytes of weights in the result.
      seconds: wall-clock time.
      fingerprint: of the result.
      nonfinite: tensors with values that are infinite or not a number -> how many.
    """

    source: Path
    path: Path
    to: Target
    dtype: str
    tensors: int
    nbytes: int
    seconds: float
    fingerprint: str
    nonfinite: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `alaya convert --json` prints it."""
        return dataclasses.asdict(self) | {"source": str(self.source), "path": str(self.path)}


def write_checkpoint(  # noqa: PLR0913 - its keywords are its settings
    source: Source,
    path: Path,
    *,
    to: Target,
    dtype: np.dtype | None,
    shard_size: int | str,
    mesh: Mesh | None,
    rules: ShardingRules,
    gguf_pre: str | None,
    resume: bool,
    progress: bool,
) -> Conversion:
    """Writes an opened checkpoint in another format; see `alaya_jax.checkpoint.convert`."""
    started = time.monotonic()
    path = absolute(path)
    if to not in get_args(Target):
        raise ConfigError(f"to = {to!r} cannot be written; use one of {get_args(Target)}")
    shard_bytes = parse_size(shard_size)
    if mesh is not None and to != "orbax":
        raise ConfigError(f"mesh is for Orbax, whose files follow it; leave it out with to={to!r}")
    if gguf_write.is_gguf(to):
        if dtype is not None:
            raise ConfigError(f"dtype is in the name of to={to!r}; leave it out, or name another")
        dtype = np.dtype(jnp.dtype(gguf_write.matrix_dtype(to)))
    elif gguf_pre is not None:
        raise ConfigError(f"gguf_pre belongs to GGUF files; leave it out with to={to!r}")
    pairs = match(source)
    parts = {
        entry.path: rules.sharding(mesh, entry.logical_axes, entry.shape)
        for entry, _ in pairs
        if mesh is not None
    }
    weights = [_weight(source, entry, tensor, dtype, to) for entry, tensor in pairs]
    matrices = {w.dtype for w in weights if len(w.entry.stored_shape) > 1}
    source.read_tokenizer()  # a damaged one is refused before anything is written
    config = source.config
    if len(matrices) == 1:
        config = dataclasses.replace(config, dtype=matrices.pop().name)
    description = None
    if gguf_write.is_gguf(to):  # what it cannot say is refused before anything is written
        description = gguf_write.describe(source, config, gguf_pre)
        config = description.config
    job = {
        "source": str(source.path.resolve()),
        "fingerprint": identify(source, (tensor for _, tensor in pairs)),
        "to": to,
        "dtypes": sorted({w.dtype.name for w in weights}),
        "shard_size": shard_bytes,
        "mesh": mesh and dict(mesh.shape),
        "gguf_pre": gguf_pre,
    }
    total = sum(w.nbytes for w in weights)
    digests: list[Digest] = []
    nonfinite: dict[str, int] = {}
    with (
        _staging(path, job, resume=resume, needed=total) as staging,
        progress_bar(f"writing {to}", total, "bytes", show=progress) as advance,
    ):

        def wrote(weight: Weight, digest: Digest, bad: int) -> None:
            digests.append(digest)
            if bad:
                nonfinite[weight.entry.hf] = bad
            advance(weight.nbytes)

        if description is not None:
            gguf_write.write_weights(staging, description, weights, wrote)
        else:
            first_does(lambda: hf_write.write_beside(staging, source, config))
            if to == "hf":
                hf_write.write_weights(staging, weights, shard_bytes, wrote, source.order)
            else:
                orbax.write_weights(staging, weights, parts, wrote)
        identity = fingerprint(config, digests)

        def finish() -> None:
            if to == "orbax":
                orbax.write_manifest(staging, config, identity, source.order)
            result = _open(staging, to)
            tensors = [tensor for _, tensor in match(result)]
            # Of Orbax, whose values are not decoded here, the manifest says it, as sealed just now.
            found = identity if to == "orbax" else identify(result, tensors)
            if result.config != config or found != identity:
                raise CheckpointError(
                    f"{path} would not be the model of {source.path}: read back, its config or its "
                    "weights differ from what was written. Check the disk and convert again"
                )

            if description is not None and gguf_pre is None:
                _check_tokenizer(source, result, path)

        first_does(finish)
    return Conversion(
        source=source.path,
        path=path,
        to=to,
        dtype=config.dtype,
        tensors=len(weights),
        nbytes=total,
        seconds=time.monotonic() - started,
        fingerprint=identity,
        nonfinite=nonfinite,
    )


def _open(staging: Path, to: Target) -> Source:
    if gguf_write.is_gguf(to):
        return open_gguf(staging / gguf_write.FILE)
    return open_hf(staging) if to == "hf" else orbax.open_orbax(staging)


def _check_tokenizer(source: Source, result: Source, path: Path) -> None:
    """Whether a tokenizer that changed its form still cuts text the same way."""
    if not same_ids(source.read_tokenizer(), result.read_tokenizer(), PROMPT):
        raise CheckpointError(
            f"the tokenizer of {path} would give other ids than that of {source.path}; write --to "
            "hf, and please report the model"
        )


def _weight(
    source: Source, entry: Entry, tensor: StoredTensor, dtype: np.dtype | None, to: Target
) -> Weight:
    own = source.dtype or tensor.dtype
    if gguf_write.is_gguf(to) and len(entry.stored_shape) == 1:
        dtype = np.dtype(np.float32)  # as llama.cpp wants norms and biases
    assert own is not None  # refused by match
    return Weight(entry, tensor, source.format, dtype or own)


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "512MiB" or a number.

    Raises:
      ConfigError: it is no such thing, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", str(size).upper())
    count = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if count <= 0:
        raise ConfigError(f"shard size {size!r} is no size; write it as 5GB or 512MiB")
    return count


@contextlib.contextmanager
def _staging(path: Path, job: dict[str, Any], *, resume: bool, needed: int) -> Iterator[Path]:
    """A directory that becomes `path` when the block ends, and stays for a resume when it fails.

    The first process of a program makes and renames it.
    """
    with contextlib.ExitStack() as stack:
        alone = _staging_of_one(path, job, resume=resume, needed=needed)
        first_does(lambda: stack.enter_context(alone))
        yield _unfinished(path)
        first_does(stack.close)


def _unfinished(path: Path) -> Path:
    return path.parent / f".{path.name}.unfinished"


@contextlib.contextmanager
def _staging_of_one(
    path: Path, job: dict[str, Any], *, resume: bool, needed: int
) -> Iterator[None]:
    staging = _unfinished(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} is there already; name another place, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume:
            _check_same(staging, path, job)
        elif staging.exists():
            raise CheckpointError(
                f"an unfinished conversion to {path} is there; continue it with --resume "
                f"(resume=True), or remove {staging} to begin anew"
            )
        free = shutil.disk_usage(path.parent).free + _size(staging)
        if free < needed:
            raise CheckpointError(
                f"{path} needs {needed:,} bytes, and {path.parent} has {free:,} free; make room, "
                "or write a smaller --dtype"
            )
        staging.mkdir(exist_ok=True)
        with (staging / _JOB).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(
                    f"another process is converting to {path}; wait for it, or end it"
                ) from error
            file.truncate(0)
            file.write(json.dumps(job, indent=2) + "\n")
            file.flush()
            yield
            (staging / _JOB).unlink()
            _sync(staging)
            if (staging / gguf_write.FILE).exists():
                (staging / gguf_write.FILE).rename(path)
                staging.rmdir()
            else:
                staging.rename(path)
            _sync_entry(path.parent)
    except OSError as error:
        if error.errno is None or isinstance(error, BlockingIOError):
            raise
        raise CheckpointError(_unwritten(error, path, staging)) from error


def _check_same(staging: Path, path: Path, job: dict[str, Any]) -> None:
    """Refuses to continue a conversion of something else."""
    if not staging.exists():
        return  # nothing was begun: begin
    try:
        begun = json.loads((staging / _JOB).read_text())
    except (OSError, ValueError):
        begun = {}
    if differing := [key for key in job if begun.get(key) != job[key]]:
        raise CheckpointError(
            f"the unfinished conversion to {path} was another one: {', '.join(differing)} "
            f"differ; use the same settings, or remove {staging} to begin anew"
        )


def _unwritten(error: OSError, path: Path, staging: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{path} was not written: the disk is full. Make room and continue with --resume, or "
            f"remove {staging}"
        )
    return f"{path} was not written ({error}); what is done is kept in {staging} for --resume"


def _size(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def _sync(directory: Path) -> None:
    """Waits until every file of a directory is on the disk."""
    for file in directory.rglob("*"):
        _sync_entry(file)
    _sync_entry(directory)


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def params_source(
    config: LlamaConfig, params: dict[str, Any], tokenizer: Tokenizer | None
) -> Source:
    """Parameters in memory, as a checkpoint to write."""
    leaves, _ = jax.tree.flatten_with_path(params)
    tensors = {}
    for keys, leaf in leaves:
        name = "/".join(str(key.key) for key in keys)
        dtype = np.dtype(leaf.dtype)
        tensors[name] = StoredTensor(
            name=name,
            shape=tuple(leaf.shape),
            stored_dtype=KINDS.get(dtype, dtype.name),
            dtype=dtype if dtype in KINDS else None,
            file=_MEMORY,
            data=None,
            decode=functools.partial(lambda leaf, _: whole(jnp.asarray(leaf)), leaf),
            array=leaf if isinstance(leaf, jax.Array) else None,
        )
    return Source(
        format="orbax",
        path=_MEMORY,
        config=config,
        tensors=tensors,
        read_tokenizer=lambda: tokenizer,
        pieces=(),
    )
