"""Weight quantization while loading: one matrix after another, straight to where it will live.

With int4 the embedding and the head stay in int8: they are a small part of a large model, and the
part whose errors the predictions show most (`benchmarks/quantized.py`). With "stored" a matrix
keeps the groups that its file holds it in; one in groups of another kind becomes int8, and one
that is not quantized stays as it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from alaya_jax.checkpoint.names import Entry, Format
from alaya_jax.checkpoint.source import StoredTensor
from alaya_jax.errors import CheckpointError, ConfigError
from alaya_jax.models.quantized import Blocks, QuantizedMatrix, Scheme, quantize, tiled

Place = Callable[[np.ndarray, tuple[str | None, ...]], jax.Array]
"""Puts an array with these logical axes on its devices."""


def is_quantizable(entry: Entry, tensor: StoredTensor, scheme: Scheme | None) -> bool:
    """Whether a parameter is kept in groups: a matrix is; norms and biases stay as they are."""
    if scheme is None or entry.path[-1] not in ("kernel", "embedding"):
        return False
    return scheme != "stored" or tensor.in_groups


def quantized_kernel(
    entry: Entry,
    tensor: StoredTensor,
    fmt: Format,
    scheme: Scheme,
    compute: np.dtype,
    place: Place,
) -> QuantizedMatrix:
    """A matrix in 8 or 4 bits, on its devices.

    Args:
      entry: which parameter it is.
      tensor: where it is stored.
      fmt: format of that file.
      scheme: how it is kept.
      compute: type of its rows.
      place: lays an array out; scales lie like the values.

    Raises:
      CheckpointError: some weights are infinite or not numbers.
      ConfigError: its shape does not suit the scheme, or does not divide over the mesh.
    """
    last = entry.stored_axes[-1][-1]
    axis = entry.axes.index(last)
    try:
        blocks = _stored(entry, tensor, fmt, axis) if scheme == "stored" else None
        if blocks is None:
            bits = "int4" if scheme == "int4" and "V" not in entry.axes else "int8"
            blocks = quantize(entry.to_params(tensor.read(), fmt), bits, axis)
        embedding = entry.path[-1] == "embedding"
        axes = entry.logical_axes
        if embedding:
            turned = (x if x is None else x.T for x in blocks)
            blocks, axes, axis = Blocks(*turned), axes[::-1], 0  # type: ignore[arg-type]
        values = tiled(blocks.values, blocks.scale.shape[axis], axis)
        return QuantizedMatrix(
            values=place(values, (*axes, None, None)),
            scale=place(blocks.scale, axes),
            offset=None if blocks.offset is None else place(blocks.offset, axes),
            inputs=axis + 1,
            axis=0 if embedding else entry.axes.index("E"),
            embedding=embedding,
            compute=compute.name,
        )
    except ValueError as error:
        raise CheckpointError(
            f"tensor {tensor.name!r} in {tensor.file.name} cannot be quantized: {error}; load it "
            "without quantize"
        ) from error
    except ConfigError as error:
        raise ConfigError(
            f"tensor {tensor.name!r}, in groups and tiles, which a mesh cannot cut: {error}"
        ) from error


def _stored(entry: Entry, tensor: StoredTensor, fmt: Format, axis: int) -> Blocks | None:
    """The groups that a tensor is stored in, laid out as the parameter; None: of another kind, or
    some lie across two positions of an axis.
    """
    blocks = tensor.groups()
    last, whole = entry.axes[axis], entry.stored_shape[-1]
    there = [x for x in blocks or () if x is not None]
    if blocks is None or any(entry.sizes[last] * x.shape[-1] % whole for x in there):
        return None

    def laid(x: np.ndarray | None) -> Any:
        if x is None:
            return None
        size = entry.sizes[last] * x.shape[-1] // whole
        return dataclasses.replace(entry, sizes=entry.sizes | {last: size}).to_params(x, fmt)

    return Blocks(*map(laid, blocks))
