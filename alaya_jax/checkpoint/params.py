"""From an opened checkpoint to the parameter pytree: check everything, then place each tensor."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from alaya_jax.checkpoint.names import AXIS_FIELDS, Entry, Format, entries
from alaya_jax.checkpoint.quantization import is_quantizable, quantized_kernel
from alaya_jax.checkpoint.source import Source, StoredTensor, refuse
from alaya_jax.models.quantized import Scheme
from alaya_jax.progress import progress_bar
from alaya_jax.settings import for_other_threads
from alaya_jax.sharding import ShardingRules

Memory = Literal["device", "pinned_host"]
_READERS = 2  # threads that make parameters of tensors: most of it is numpy at work without the GIL
_ALIGNED = 64  # bytes; what XLA asks of memory on a CPU that it is to use without copying it
_STRIP = 16  # columns copied at once in a transposition: the fastest of 8 to 128
_TIED_HEAD = "lm_head.weight"
_HARMLESS = ".rotary_emb.inv_freq"  # a buffer that early transformers versions saved


def match(source: Source) -> list[tuple[Entry, StoredTensor]]:
    """Pairs every parameter of the config with its stored tensor.

    Raises:
      CheckpointError: one error that lists every missing, unexpected, misshaped or unreadable
        tensor, together with what was already wrong with the files.
    """
    problems = list(source.problems)
    known = len(source.tensors) + len(source.unreadable)
    if source.config.num_hidden_layers > known:  # before a list of so many layers is made
        layers = source.config.num_hidden_layers
        refuse(
            source.path, [*problems, f"the config has {layers} layers, the files {known} tensors"]
        )
    rest = dict(source.tensors)
    pairs: list[tuple[Entry, StoredTensor]] = []
    for entry in entries(source.config):
        name = entry.name(source.format)
        tensor = rest.pop(name, None)
        if tensor is None:
            if name not in source.unreadable:
                problems.append(_missing(name, entry, source.format))
        elif tensor.shape != (shape := entry.shape_in(source.format)):
            fields = [AXIS_FIELDS[a] for a in "".join(entry.stored_axes)]
            problems.append(
                f"tensor {name!r} in {tensor.file.name} has shape {list(tensor.shape)}, the config "
                f"({', '.join(dict.fromkeys(fields))}) needs {list(shape)}"
            )
        elif tensor.dtype is None:
            problems.append(
                f"tensor {name!r} in {tensor.file.name} is stored as {tensor.stored_dtype}, which "
                "cannot be read; write the checkpoint in F32, F16 or BF16"
            )
        else:
            pairs.append((entry, tensor))
    problems += _unexpected(source, rest)
    refuse(source.path, problems)
    return pairs


def _missing(name: str, entry: Entry, fmt: Format) -> str:
    line = f"tensor {name!r} {list(entry.shape_in(fmt))} is missing"
    if entry.path == ("lm_head", "kernel"):
        line += "; if the model ties it to its embedding, set tie_word_embeddings in config.json"
    return line


def _unexpected(source: Source, rest: dict[str, StoredTensor]) -> Iterator[str]:
    for name, tensor in rest.items():
        if source.format == "hf" and name.endswith(_HARMLESS):
            continue
        if source.format == "hf" and name == _TIED_HEAD and source.config.tie_word_embeddings:
            embedding = source.tensors.get("model.embed_tokens.weight")
            if embedding is None or _same_bytes(embedding, tensor):
                continue
            yield (
                f"tensor {name!r} in {tensor.file.name} differs from the embedding although the "
                "config says tie_word_embeddings; set it to false to use the tensor"
            )
            continue
        yield (
            f"tensor {name!r} in {tensor.file.name} belongs to no parameter of this config, and "
            "leaving it out would make another model; correct the config, or remove the tensor"
        )


def _same_bytes(a: StoredTensor, b: StoredTensor, chunk: int = 1 << 24) -> bool:
    if a.data is None or b.data is None or a.stored_dtype != b.stored_dtype or a.shape != b.shape:
        return False
    starts = range(0, a.data.size, chunk)
    return all(np.array_equal(a.data[i : i + chunk], b.data[i : i + chunk]) for i in starts)


def load_params(
    pairs: list[tuple[Entry, StoredTensor]],
    fmt: Format,
    *,
    mesh: Mesh | None,
    rules: ShardingRules,
    dtype_of: Callable[[StoredTensor], np.dtype],
    quantize: Scheme | None,
    memory: Memory,
    progress: bool,
) -> dict[str, Any]:
    """Reads the tensors one after another straight to where they will live.

    Each device gets only its slice of the memory-mapped file. Two threads read, and each lets go of
    a tensor before it reads another: the host holds about two tensors beside the result.

    Args:
      pairs: parameters and their tensors, from `match`.
      fmt: format the tensors are stored in.
      mesh: devices; None puts everything on the default device.
      rules: where each logical axis lies on the mesh.
      dtype_of: type a tensor is cast to.
      quantize: how to keep matrices; None: as they are.
      memory: of the devices, or the host's that they can reach.
      progress: whether to show a progress bar on stderr.

    Raises:
      CheckpointError: a matrix cannot be quantized.
      ConfigError: an axis does not divide over the mesh.
    """

    def sharding(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> Sharding | None:
        return placement(mesh, rules, axes, shape, memory)

    def place(array: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
        where = sharding(axes, array.shape)
        return _place(array, where, array.dtype).block_until_ready()

    def load(pair: tuple[Entry, StoredTensor]) -> Any:
        entry, tensor = pair
        dtype = dtype_of(tensor)
        if quantize is not None and is_quantizable(entry, tensor, quantize):
            value = quantized_kernel(entry, tensor, fmt, quantize, dtype, place)
        else:
            view = entry.to_params(tensor.read(), fmt)
            where = sharding(entry.logical_axes, entry.shape)
            # Waiting keeps no more than this tensor's host buffers alive.
            value = _place(view, where, dtype).block_until_ready()
        tensor.release()
        return value

    for entry, _ in pairs:
        sharding(entry.logical_axes, entry.shape)  # refused before anything is read
    params: dict[str, Any] = {}
    total = sum(tensor.nbytes for _, tensor in pairs)
    with progress_bar("loading weights", total, "bytes", show=progress) as advance:
        for (entry, tensor), value in zip(pairs, _ahead(load, pairs), strict=True):
            node = params
            for key in entry.path[:-1]:
                node = node.setdefault(key, {})
            node[entry.path[-1]] = value
            advance(tensor.nbytes)
    return params


def _ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map`, with so many of the next results under way as there are threads."""
    function = for_other_threads(function)
    with ThreadPoolExecutor(_READERS) as threads:
        coming: collections.deque[Future[Any]] = collections.deque()
        try:
            for item in items:
                coming.append(threads.submit(function, item))
                if len(coming) > _READERS:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


def placement(
    mesh: Mesh | None,
    rules: ShardingRules,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    memory: Memory,
) -> Sharding | None:
    """Where an array goes; None: on JAX's default device.

    Raises:
      ConfigError: an axis does not divide over the mesh.
    """
    if mesh is not None:
        sharding = rules.sharding(mesh, axes, shape)
        return sharding if memory == "device" else sharding.with_memory_kind(memory)
    if memory == "device":
        return None
    return SingleDeviceSharding(default_device(), memory_kind=memory)


def default_device() -> Any:
    """Where JAX puts an array unless it is told otherwise."""
    return jax.config.jax_default_device or jax.local_devices()[0]


def _place(view: np.ndarray, sharding: Sharding | None, dtype: np.dtype) -> jax.Array:
    if sharding is None:
        return jax.device_put(copy_as(view, dtype))
    slices: dict[str, np.ndarray] = {}  # replicas share one host copy

    def piece(index: tuple[slice, ...] | None) -> np.ndarray:
        key = str(index)
        if key not in slices:
            slices[key] = copy_as(view[index or ()], dtype)
        return slices[key]

    return jax.make_array_from_callback(view.shape, sharding, piece)


def copy_as(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous copy of a possibly transposed view, cast to `dtype`; aligned as XLA likes it.

    Copying a transposed matrix at once walks the source by whole rows and misses the cache on every
    element; in strips it is several times faster.
    """
    memory = np.empty(view.size * dtype.itemsize + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    out = memory[start : start + view.size * dtype.itemsize].view(dtype).reshape(view.shape)
    if view.flags.c_contiguous:
        np.copyto(out, view, casting="unsafe")
        return out
    source, target = view, out
    if view.dtype == dtype and dtype.itemsize == 2:  # numpy copies its own types faster
        source, target = view.view(np.uint16), out.view(np.uint16)
    for start in range(0, view.shape[-1], _STRIP):
        strip = np.s_[..., start : start + _STRIP]
        target[strip] = source[strip]
    return out
