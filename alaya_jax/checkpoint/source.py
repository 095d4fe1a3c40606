"""What every checkpoint format is opened as: a config and named tensors that are still on disk."""

import dataclasses
import math
import mmap
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alaya_jax.checkpoint.names import Format
from alaya_jax.checkpoint.order import Order
from alaya_jax.errors import CheckpointError
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.quantized import Blocks
from alaya_jax.models.tokenizer import Tokenizer

_MAX_PROBLEMS = 20


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still on disk.

    Attributes:
      name: its name in the file.
      shape: its logical shape, in HF's dimension order.
      stored_dtype: the format's own name of its type, such as "BF16" or "Q4_1".
      dtype: type of the values `read` gives; None when the type cannot be read.
      file: where it lies.
      data: its stored bytes, a uint8 view of the memory map; None where the format scatters them.
      decode: reads the values, of `dtype` and `shape`.
      array: the values where they lie on devices, when they are not on disk at all.
      in_groups: whether it is quantized, as integers and scales.
      decode_groups: reads those; None where there are none, or nothing reads them.
    """

    name: str
    shape: tuple[int, ...]
    stored_dtype: str
    dtype: np.dtype | None
    file: Path
    data: np.ndarray | None
    decode: Callable[["StoredTensor"], np.ndarray]
    array: jax.Array | None = None
    in_groups: bool = False
    decode_groups: Callable[["StoredTensor"], Blocks | None] | None = None

    def groups(self) -> Blocks | None:
        """Integers and scales, along the last axis; None where they cannot be had as they are."""
        return self.decode_groups(self) if self.decode_groups is not None else None

    def read(self) -> np.ndarray:
        """The values; a view of the memory map where the type allows it."""
        return self.decode(self)

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        if self.data is not None:
            return self.data.size
        assert self.dtype is not None
        return math.prod(self.shape) * self.dtype.itemsize

    def release(self) -> None:
        """Gives the memory of mapped pages that were read back to the system."""
        if self.data is not None:
            release(self.data)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some of a checkpoint's stored bytes, and what they are.

    Attributes:
      name: unique in the checkpoint.
      shape, stored_dtype: of the tensor they are.
      file: where they lie.
      data: the bytes, a uint8 view of the memory map.
    """

    name: str
    shape: tuple[int, ...]
    stored_dtype: str
    file: Path
    data: np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint: everything known, no weights read yet.

    Attributes:
      format: which column of the name table its tensors follow.
      path: the directory or file.
      config: architecture.
      tensors: by name.
      read_tokenizer: the checkpoint's tokenizer, or None when it has none.
      dtype: type of the parameters when the caller asks for none; None keeps each tensor's own.
      quantized: some weights are of a quantized type.
      problems: what is already known to be wrong, one line each.
      unreadable: names of tensors that a line of `problems` accounts for.
      pieces: the stored bytes that make its identity, where they are not those of its tensors.
      stated: a fingerprint that the checkpoint states, and the seal of the pieces for which it
        holds.
      gguf_tokenizer: the tokenizer as GGUF metadata, where it is kept so.
      order: the order in which its tensors fill the files of an HF checkpoint, where that is known.
      opened: when it was opened, seconds since 1970: a file put in its place later is not what was
        read.
    """

    format: Format
    path: Path
    config: LlamaConfig
    tensors: dict[str, StoredTensor]
    read_tokenizer: Callable[[], Tokenizer | None]
    dtype: np.dtype | None = None
    quantized: bool = False
    problems: tuple[str, ...] = ()
    unreadable: frozenset[str] = frozenset()
    pieces: tuple[Piece, ...] | None = None
    stated: tuple[str, str] | None = None
    gguf_tokenizer: dict[str, Any] | None = None
    order: Order = "names"
    opened: float = dataclasses.field(default_factory=time.time)


def absolute(path: Path) -> Path:
    """The absolute path, which stays right when the working directory changes; without '..', which
    Orbax refuses.
    """
    path = path.expanduser().absolute()
    return path.resolve() if ".." in path.parts else path


def release(data: np.ndarray) -> None:
    """Gives the memory of the mapped pages under a view back to the system; they can be read again.

    A view of anything else is left alone.
    """
    base: object = data
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap):
        return
    first = data.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    start = first // mmap.PAGESIZE * mmap.PAGESIZE
    base.madvise(mmap.MADV_DONTNEED, start, first + data.size - start)


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
