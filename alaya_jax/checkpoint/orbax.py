"""Orbax checkpoints: the parameter pytree as it is in memory, restored straight onto any mesh.

A directory holds what an HF checkpoint holds beside its weights (config.json, tokenizer files), the
model's fingerprint, and in `params` a plain Orbax checkpoint that `ocp.load` takes by itself:

    config.json  tokenizer.json  ...  alaya_checkpoint.json  params/
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from alaya_jax.checkpoint.hf import INDEX, SINGLE, has_tokenizer, read_config
from alaya_jax.checkpoint.identity import Digest, digest_pieces, seal_of
from alaya_jax.checkpoint.names import entries
from alaya_jax.checkpoint.order import Order
from alaya_jax.checkpoint.params import Memory, default_device, placement
from alaya_jax.checkpoint.source import Piece, Source, StoredTensor
from alaya_jax.checkpoint.weights import KINDS, Weight, blocks, cast, count_nonfinite
from alaya_jax.errors import CheckpointError, ConfigError
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.tokenizer import Tokenizer
from alaya_jax.progress import progress_bar
from alaya_jax.sharding import ShardingRules

PARAMS = "params"
MANIFEST = "alaya_checkpoint.json"
_VERSION = 1
_MARK = "_CHECKPOINT_METADATA"  # Orbax's own file in every finished checkpoint
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)
_GROUP = 3 << 25  # bytes of small tensors saved at once: each time costs tens of milliseconds
_CHUNK = 1 << 27  # bytes of an array read and written at once


def is_orbax(path: Path) -> bool:
    """Whether a directory is an Orbax checkpoint, ours or a bare one; Orbax is not imported."""
    return (path / PARAMS / _MARK).exists() or (path / _MARK).exists()


def open_orbax(path: Path) -> Source:
    """Opens a checkpoint that `save` or `convert` wrote with `to="orbax"`; reads no weights.

    Raises:
      CheckpointError: it lacks the config or the fingerprint, or is damaged.
      ConfigError: its config is not understood.
    """
    if not (path / MANIFEST).exists():
        raise CheckpointError(
            f"{path} is an Orbax checkpoint without {MANIFEST}, so its model is unknown; restore "
            "it with orbax, and write it with alaya_jax.checkpoint.save(path, config, params)"
        )
    if others := [name for name in (SINGLE, INDEX) if (path / name).exists()]:
        raise CheckpointError(
            f"{path} holds two sets of weights, {PARAMS}/ and {others[0]}; which is the model's "
            "cannot be told: move one of them away"
        )
    config = read_config(path / "config.json")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, stored = manifest["version"], manifest["dtype"]
        stated = manifest["fingerprint"], manifest.get("seal", "")
        order: Order = "modules" if manifest.get("order") == "modules" else "names"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / MANIFEST} is damaged ({error!r}); copy or convert the checkpoint again"
        ) from error
    if version != _VERSION:
        raise CheckpointError(
            f"{path} is of version {version}, this program reads {_VERSION}; update alaya_jax"
        )
    if config.dtype != stored:
        raise ConfigError(
            f"{path / 'config.json'} says dtype {config.dtype!r}, {MANIFEST} {stored!r}; copy or "
            "convert the checkpoint again"
        )
    tensors = {name: _tensor(path, name, leaf) for name, leaf in _metadata(path).items()}
    return Source(
        format="orbax",
        path=path,
        config=config,
        tensors=tensors,
        read_tokenizer=lambda: Tokenizer.from_directory(path) if has_tokenizer(path) else None,
        pieces=_pieces(path),
        stated=stated,
        order=order,
    )


def _pieces(path: Path) -> tuple[Piece, ...]:
    """The files of the weights, whole: what they hold is not decoded for an identity."""
    params, pieces = path / PARAMS, []
    for file in sorted(p for p in params.rglob("*") if p.is_file()):
        size, empty = file.stat().st_size, np.zeros(0, np.uint8)
        data = np.memmap(file, np.uint8, "r").view(np.ndarray) if size else empty
        pieces.append(Piece(file.relative_to(params).as_posix(), (size,), "file", file, data))
    return tuple(pieces)


def _metadata(path: Path) -> dict[str, Any]:
    """Shape and dtype of every stored array, by the keys of its path joined with '/'."""
    from orbax.checkpoint import v1 as ocp

    with _named_damage(path):
        tree = ocp.metadata(str(path / PARAMS)).metadata
        if tree is None:  # Orbax logs the reason
            raise ValueError("its metadata or its manifest is damaged")
        leaves, _ = jax.tree.flatten_with_path(tree)
        return {"/".join(str(key.key) for key in keys): leaf for keys, leaf in leaves}


def _tensor(path: Path, name: str, leaf: Any) -> StoredTensor:
    dtype = np.dtype(leaf.dtype)
    return StoredTensor(
        name=name,
        shape=tuple(leaf.shape),
        stored_dtype=KINDS.get(dtype, dtype.name),
        dtype=dtype if dtype in KINDS else None,
        file=path / PARAMS,
        data=None,
        decode=_read_one,
    )


def _read_one(tensor: StoredTensor) -> np.ndarray:
    # By what Orbax itself reads with: asking Orbax for one array costs 20 ms more each time.
    import tensorstore as ts

    assert tensor.dtype is not None  # refused before anything is read
    base = {"driver": "file", "path": f"{tensor.file / 'state'}{os.sep}"}
    name = f"{tensor.name.replace('/', '.')}/"
    spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "path": name}}
    with _named_damage(tensor.file.parent):
        return ts.open(spec, open=True).result().read().result()


def load_tree(
    source: Source,
    *,
    mesh: Mesh | None,
    rules: ShardingRules,
    dtype_of: Callable[[StoredTensor], np.dtype],
    memory: Memory,
    progress: bool,
) -> dict[str, Any]:
    """Restores all parameters; each device reads only its own part of the files.

    Args:
      source: from `open_orbax`, checked by `match`.
      mesh: devices; None puts everything on the default device. It need not be the mesh that the
        checkpoint was saved on.
      rules: where each logical axis lies on the mesh.
      dtype_of: type a tensor is cast to.
      memory: of the devices, or the host's that they can reach.
      progress: whether to show a progress bar on stderr.

    Raises:
      CheckpointError: the files are damaged.
      ConfigError: an axis does not divide over the mesh.
    """
    from orbax.checkpoint import v1 as ocp

    default = SingleDeviceSharding(default_device())
    layers: dict[str, dict[tuple[str, ...], Any]] = {}
    for entry in entries(source.config):
        sharding = placement(mesh, rules, entry.logical_axes, entry.shape, memory)
        dtype = dtype_of(source.tensors[entry.name("orbax")])
        leaf = jax.ShapeDtypeStruct(entry.shape, dtype, sharding=sharding or default)
        layers.setdefault(entry.path[0], {})[entry.path] = leaf
    params: dict[str, Any] = {}
    total = sum(tensor.nbytes for tensor in source.tensors.values())
    with (
        _named_damage(source.path),
        _context(partial=True),
        progress_bar("loading weights", total, "bytes", show=progress) as advance,
    ):
        for leaves in layers.values():  # a layer at a time: the host need not hold more
            loaded = ocp.load(str(source.path / PARAMS), _nested(leaves))
            params |= jax.block_until_ready(loaded)
            advance(sum(source.tensors["/".join(keys)].nbytes for keys in leaves))
    return params


def write_weights(
    directory: Path,
    weights: list[Weight],
    parts: dict[tuple[str, ...], NamedSharding],
    wrote: Callable[[Weight, Digest, int], None],
) -> None:
    """Writes all weights into a directory; what an interrupted run saved there is kept.

    Args:
      directory: an existing directory.
      weights: every parameter of the model.
      parts: by path, into which parts to cut a parameter; one that is missing is stored as it lies
        in memory, or in one part.
      wrote: called for each weight with its digest in an HF file and the number of its values that
        are not finite.
    """
    from orbax.checkpoint import v1 as ocp

    path = directory / PARAMS
    if path.exists():  # only the end of the conversion was missing
        done = {weight.entry.path for weight in weights}
    else:
        done = _recover(directory)
    saver = _Saver(path)
    with _context(), saver:
        for weight in weights:
            saver.make_room(weight.nbytes)  # before it is read
            view = weight.layout("orbax")
            digest = weight.digest(weight.entry.to_stored(view, "hf"))
            values = cast(view, weight.dtype)
            nonfinite = sum(map(count_nonfinite, blocks(values, values.dtype)))
            if weight.entry.path not in done:
                saver.add(weight, _in_parts(weight, values, parts))
            del view, values
            weight.tensor.release()
            wrote(weight, digest, nonfinite)
        saver.finish()
        if not path.exists():
            with _as_os_error(path):
                ocp.partial.finalize(str(path))


class _Saver:
    """Saves parameters in groups; while one is written, the next is read.

    So there are two groups in memory, each of one tensor or of at most `_GROUP` bytes.
    """

    def __init__(self, path: Path):
        self._path = path
        self._group: dict[tuple[str, ...], np.ndarray | jax.Array] = {}
        self._read: list[Weight] = []
        self._writing: Any = None
        self._written: list[Weight] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if self._writing is not None:  # cut off: no write may go on behind what follows
            with contextlib.suppress(Exception):
                self._writing.result()

    def make_room(self, nbytes: int) -> None:
        """Begins to write the group when a tensor of so many bytes does not fit into it."""
        if self._group and sum(x.nbytes for x in self._group.values()) + nbytes > _GROUP:
            self._begin()

    def add(self, weight: Weight, values: np.ndarray | jax.Array) -> None:
        """Puts a parameter into the group; its values must stay as they are."""
        self._group[weight.entry.path] = values
        self._read.append(weight)

    def finish(self) -> None:
        """Writes the rest and waits for it."""
        if self._group:
            self._begin()
        self._wait()

    def _begin(self) -> None:
        from orbax.checkpoint import v1 as ocp

        self._wait()
        with _as_os_error(self._path):
            self._writing = ocp.partial.save_async(str(self._path), _nested(self._group))
        self._written, self._read, self._group = self._read, [], {}

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with _as_os_error(self._path):
                writing.result()
        while self._written:  # again: what is stored as it is was read through the map just now
            self._written.pop().tensor.release()


def _in_parts(
    weight: Weight, values: np.ndarray, parts: dict[tuple[str, ...], NamedSharding]
) -> np.ndarray | jax.Array:
    """What is saved: each process writes the parts that its devices hold."""
    if weight.tensor.array is not None:
        return weight.tensor.array.astype(weight.dtype)
    if (sharding := parts.get(weight.entry.path)) is None:
        return values
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def write_manifest(
    directory: Path, config: LlamaConfig, fingerprint: str, order: Order = "names"
) -> None:
    """Writes what makes an Orbax checkpoint one of ours: above all, which model it is.

    The fingerprint is that of an HF checkpoint of the same values, and holds for these very files.
    """
    manifest = {"version": _VERSION, "fingerprint": fingerprint, "dtype": config.dtype}
    manifest["order"] = order  # so that an HF checkpoint comes back in its own files
    manifest["seal"] = seal_of(digest_pieces(_pieces(directory)))
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _recover(directory: Path) -> set[tuple[str, ...]]:
    """Paths of the parameters that an interrupted run saved whole; half-saved ones are removed."""
    done: set[tuple[str, ...]] = set()
    for session in directory.glob(f"{PARAMS}.*"):
        if session.name.endswith("-tmp"):  # cut off before its first save was whole
            shutil.rmtree(session)
            continue
        for part in session.iterdir():
            metadata = part / "state" / "_METADATA"
            if not (part / "commit_success.txt").exists() or not metadata.exists():
                shutil.rmtree(part)
                continue
            for leaf in json.loads(metadata.read_text())["tree_metadata"].values():
                done.add(tuple(key["key"] for key in leaf["key_metadata"]))
    return done


def _nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, last), leaf in leaves.items():
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _context(*, partial: bool = False) -> Any:
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly shrink, and it is 4 times slower
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    context.array.saving.enable_post_merge_validation = False  # all is read back in the end
    context.memory.deepcopy_host_arrays = False  # nobody changes them
    context.pytree.loading.partial_load = partial
    return context


@contextlib.contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"{path / PARAMS} cannot be restored ({reason:.300}); copy or convert it again"
        ) from error


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Orbax reports a full disk, or one it cannot write, as a ValueError with a long text."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        code = next((c for c in _WRITE_ERRORS if os.strerror(c) in str(error)), None)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from error
