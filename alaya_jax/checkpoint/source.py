"""What every checkpoint format is opened as: a config and named tensors that are still on disk."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from alaya_jax.checkpoint.names import Format
from alaya_jax.errors import CheckpointError
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.tokenizer import Tokenizer

_MAX_PROBLEMS = 20
_PROBE = 4096  # bytes of a tensor read at each of three places for the fingerprint


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a memory-mapped file.

    Attributes:
      name: its name in the file.
      shape: its logical shape, in HF's dimension order.
      stored_dtype: the format's own name of its type, such as "BF16" or "Q4_1".
      dtype: type of the values `read` gives; None when the type cannot be read.
      file: where it lies.
      data: its stored bytes, a uint8 view of the memory map.
      decode: stored bytes -> values of `dtype` and `shape`.
    """

    name: str
    shape: tuple[int, ...]
    stored_dtype: str
    dtype: np.dtype | None
    file: Path
    data: np.ndarray
    decode: Callable[["StoredTensor"], np.ndarray]

    def read(self) -> np.ndarray:
        """The values; a view of the memory map where the type allows it."""
        return self.decode(self)


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint: everything known, no weights read yet.

    Attributes:
      format: which column of the name table its tensors follow.
      path: the directory or file.
      config: architecture.
      tensors: by name.
      dtype: type of the parameters when the caller asks for none; None keeps each tensor's own.
      quantized: some weights are of a quantized type.
      problems: what is already known to be wrong, one line each.
      unreadable: names of tensors that a line of `problems` accounts for.
      read_tokenizer: the checkpoint's tokenizer, or None when it has none.
    """

    format: Format
    path: Path
    config: LlamaConfig
    tensors: dict[str, StoredTensor]
    dtype: np.dtype | None
    quantized: bool
    problems: tuple[str, ...]
    unreadable: frozenset[str]
    read_tokenizer: Callable[[], Tokenizer | None]


def refuse(where: Path, problems: Iterable[str]) -> None:
    """Raises one CheckpointError that lists all problems; returns when there are none."""
    problems = list(problems)
    if not problems:
        return
    lines = problems[:_MAX_PROBLEMS]
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"... and {len(problems) - _MAX_PROBLEMS} more")
    head = (
        "cannot be loaded:"
        if len(problems) == 1
        else f"cannot be loaded, {len(problems)} problems:"
    )
    raise CheckpointError("\n  - ".join([f"{where} {head}", *lines]))


def fingerprint(config: LlamaConfig, tensors: Iterable[StoredTensor]) -> str:
    """Identity of a model's weights without reading all of them.

    Returns:
      sha256 (hex) over the config and, per tensor by name: name, shape, stored type, length and the
      first, middle and last 4 KiB of its stored bytes.
    """
    digest = hashlib.sha256(json.dumps(config.to_hf(), sort_keys=True).encode())
    for tensor in sorted(tensors, key=lambda t: t.name):
        size = tensor.data.size
        head = [tensor.name, list(tensor.shape), tensor.stored_dtype, size]
        digest.update(json.dumps(head).encode())
        for start in (0, max(0, (size - _PROBE) // 2), max(0, size - _PROBE)):
            digest.update(tensor.data[start : start + _PROBE].tobytes())
    return digest.hexdigest()
