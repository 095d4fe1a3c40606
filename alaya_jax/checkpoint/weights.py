"""A parameter on its way from one file to another: read, laid out and cast in blocks."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from alaya_jax.checkpoint.identity import Digest
from alaya_jax.checkpoint.names import Entry, Format
from alaya_jax.checkpoint.params import copy_as
from alaya_jax.checkpoint.source import StoredTensor

KINDS = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
_BLOCK = 1 << 24  # bytes cast and written at once


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter, where it comes from and the type it is written as.

    Attributes:
      entry: its row of the name table.
      tensor: where it is stored.
      format: format of that file.
      dtype: type to write.
    """

    entry: Entry
    tensor: StoredTensor
    format: Format
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes it takes as written."""
        return math.prod(self.entry.shape) * self.dtype.itemsize

    def layout(self, fmt: Format) -> np.ndarray:
        """The values in the layout of `fmt`, not yet cast; a view of the file where possible."""
        stored = self.tensor.read()
        if fmt == self.format:
            return stored
        return self.entry.to_stored(self.entry.to_params(stored, self.format), fmt)

    def digest(self, view: np.ndarray, fmt: Format = "hf") -> Digest:
        """This tensor's part of the fingerprint of an HF checkpoint, or of one in format `fmt`.

        Args:
          view: `layout(fmt)`.
          fmt: the format.
        """
        found = hashlib.sha256()
        for block in blocks(view, self.dtype):
            found.update(block.reshape(-1).view(np.uint8))
        name, shape = self.entry.name(fmt), self.entry.stored_shape
        return Digest(name, shape, KINDS[self.dtype], self.nbytes, found.hexdigest())


def blocks(view: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The values in the order of their bytes in a file: contiguous blocks of rows, cast."""
    rows = max(1, _BLOCK // max(1, math.prod(view.shape[1:]) * dtype.itemsize))
    for start in range(0, view.shape[0], rows):
        yield cast(view[start : start + rows], dtype)


def cast(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous array of `dtype`, rounded to nearest even; `view` itself if it is that already.

    What is too large for the type becomes infinite; `count_nonfinite` finds it.
    """
    if view.dtype == dtype and view.flags.c_contiguous:
        return view
    with np.errstate(over="ignore", invalid="ignore"):
        return copy_as(view, dtype)


def count_nonfinite(block: np.ndarray) -> int:
    """How many values are infinite or not a number, by their exponent bits."""
    bits = block.view(np.uint32 if block.dtype.itemsize == 4 else np.uint16)
    exponent = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[KINDS[block.dtype]]
    mask = bits.dtype.type(exponent)
    return int(np.count_nonzero((bits & mask) == mask))
