"""GGUF files of architecture 'llama': header parsed, tensors dequantized one at a time.

The header is parsed here: the `gguf` package's reader takes seconds for a vocabulary and reads past
the end of a truncated file without noticing. Its dequantization is used as it is.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as QuantType

from alaya_jax.checkpoint import gguf_blocks
from alaya_jax.checkpoint.gguf_config import ROPE_FREQS, read_config
from alaya_jax.checkpoint.source import Source, StoredTensor
from alaya_jax.errors import CheckpointError, ConfigError
from alaya_jax.models.quantized import Blocks
from alaya_jax.models.tokenizer import Tokenizer

MAGIC = b"GGUF"
_AGAIN = "download or copy the file again"
_PLAIN = {
    QuantType.F32: np.dtype(np.float32),
    QuantType.F16: np.dtype(np.float16),
    QuantType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_LONG_ROW = (
    4096  # elements; a sixteenth of what the library works on at once: small enough for a cache
)
_STRING, _ARRAY = 8, 9
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


def open_gguf(path: Path) -> Source:
    """Opens a GGUF file. Reads metadata and tensor table, no weights.

    Raises:
      CheckpointError: not a GGUF file, truncated or damaged, or of another architecture.
      ConfigError: metadata describes a model that is not understood.
    """
    metadata, tensors = read_header(path)
    if metadata.get("split.count", 1) not in (0, 1):  # only the first part says what the model is
        raise CheckpointError(
            f"{path} is one of {metadata['split.count']} parts; join them with "
            "`llama-gguf-split --merge` and load the result"
        )
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{path} holds architecture {architecture!r}; only 'llama' can be loaded"
        )
    stored = [t for t in tensors.values() if len(t.shape) > 1]
    quantized = any(t.stored_dtype not in ("F32", "F16", "BF16") for t in stored)
    kinds = {t.dtype for t in stored if t.dtype is not None}
    # GGUF keeps norms in float32 whatever the matrices are; one type for all follows the matrices.
    dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
    try:
        config = read_config(metadata, tensors, dtype)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} has metadata of a wrong type or value ({error})") from error
    tensors.pop(ROPE_FREQS, None)
    return Source(
        format="gguf",
        path=path,
        config=config,
        tensors=tensors,
        dtype=dtype,
        quantized=quantized,
        problems=(),
        unreadable=frozenset(),
        read_tokenizer=lambda: _read_tokenizer(metadata),
        gguf_tokenizer={k: v for k, v in metadata.items() if k.startswith("tokenizer.")},
    )


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors of a GGUF file, version 2 or 3.

    Returns:
      metadata (strings, numbers, lists of them) by key, tensors by name.

    Raises:
      CheckpointError: the file is no GGUF, truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start[:4] != MAGIC:
            raise CheckpointError(
                f"{path} is not a GGUF file: it starts with {start[:4]!r}; {_AGAIN}"
            )
        mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror})") from error
    header = _Header(memoryview(mapped), 4)
    try:
        return _parse(path, header, mapped)
    except struct.error as error:
        raise CheckpointError(
            f"{path} is truncated: its header goes on past the end, {mapped.size:,} bytes; {_AGAIN}"
        ) from error
    except (ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged near byte {header.at:,} ({error}); {_AGAIN}"
        ) from error


def _read_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    if "tokenizer.ggml.model" not in metadata:
        return None
    return Tokenizer.from_gguf(metadata)


class _Header:
    """A cursor over the little-endian header; reading past the end is `struct.error`."""

    def __init__(self, buffer: memoryview, at: int):
        self.buffer, self.at = buffer, at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.buffer, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def numbers(self, code: str, count: int) -> list[Any]:
        self.need(count * struct.calcsize("<" + code))
        values = struct.unpack_from(f"<{count}{code}", self.buffer, self.at)
        self.at += count * struct.calcsize("<" + code)
        return list(values)

    def string(self) -> str:
        length = self.number("Q")
        self.need(length)
        self.at += length
        return str(self.buffer[self.at - length : self.at], "utf-8")

    def need(self, count: int) -> None:
        """Checks a length before anything is allocated by it."""
        if count > len(self.buffer) - self.at:
            raise struct.error("past the end")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"metadata type {kind} is unknown")
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            return self.numbers(_SCALARS[item], count)
        self.need(count)
        return [self.value(item) for _ in range(count)]


def _parse(path: Path, header: _Header, mapped: np.ndarray):
    version = header.number("I")
    if version & 0xFFFF == 0:
        raise CheckpointError(
            f"{path} is a big-endian GGUF file; convert it to little-endian first"
        )
    if version not in (2, 3):
        raise CheckpointError(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
    num_tensors, num_keys = header.numbers("Q", 2)
    header.need(num_tensors + num_keys)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = header.string()
        if key in metadata:
            raise ValueError(f"metadata key {key!r} occurs twice")
        metadata[key] = header.value(header.number("I"))
    infos: dict[str, tuple[tuple[int, ...], QuantType, int]] = {}
    for _ in range(num_tensors):
        name = header.string()
        if name in infos:
            raise ValueError(f"tensor {name!r} occurs twice")
        dims = header.numbers("Q", header.number("I"))
        infos[name] = (tuple(reversed(dims)), QuantType(header.number("I")), header.number("Q"))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"general.alignment is {alignment!r}")
    base = -(-header.at // alignment) * alignment

    tensors: dict[str, StoredTensor] = {}
    for name, (shape, kind, offset) in infos.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(
                f"tensor {name!r} of shape {list(shape)} is not made of {kind.name} blocks"
            )
        begin, length = base + offset, math.prod(shape) // block * block_bytes
        if begin + length > mapped.size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {begin + length:,}, the file "
                f"at {mapped.size:,}; {_AGAIN}"
            )
        data = mapped[begin : begin + length]
        tensors[name] = StoredTensor(
            name,
            shape,
            kind.name,
            _value_dtype(kind),
            path,
            data,
            _decode,
            in_groups=kind not in _PLAIN,
            decode_groups=_groups,
        )
    return metadata, tensors


def _value_dtype(kind: QuantType) -> np.dtype | None:
    """Type of a tensor's values: its own, float32 if quantized, None if it cannot be read."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return None
    return np.dtype(np.float32)


def _decode(tensor: StoredTensor) -> np.ndarray:
    assert tensor.data is not None  # a GGUF tensor is one stretch of the file
    kind = QuantType[tensor.stored_dtype]
    if kind in _PLAIN:
        return tensor.data.view(_PLAIN[kind]).reshape(tensor.shape)
    # The library works on 16 rows at a time, however short they are. Blocks lie one behind the
    # other, so several rows are as well one long row.
    *lead, width = tensor.shape
    count = math.prod(lead)
    together = max(n for n in range(1, max(1, _LONG_ROW // width) + 1) if count % n == 0)
    rows = tensor.data.reshape(count // together, -1)
    return gguf.quants.dequantize(rows, kind).reshape(tensor.shape)


def _groups(tensor: StoredTensor) -> Blocks | None:
    assert tensor.data is not None
    kind = QuantType[tensor.stored_dtype]
    if not gguf_blocks.is_kept(kind):
        return None
    return gguf_blocks.groups(tensor.data, tensor.shape, kind, tensor.read)
