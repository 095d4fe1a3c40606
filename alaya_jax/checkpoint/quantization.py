"""Weight quantization while loading: one matrix after another, straight to where it will live.

With int4 the embedding and the head stay in int8: they are a small part of a large model, and the
part whose errors the predictions show most (`benchmarks/quantized.py`: the KL of a 135M model falls
from 0.61 to 0.48 nats).
"""

from collections.abc import Callable

import jax
import numpy as np

from alaya_jax.checkpoint.names import Entry
from alaya_jax.checkpoint.source import StoredTensor
from alaya_jax.errors import CheckpointError, ConfigError
from alaya_jax.models.quantized import QuantizedMatrix, Scheme, quantize

Place = Callable[[np.ndarray, tuple[str | None, ...]], jax.Array]
"""Puts an array with these logical axes on its devices."""


def is_quantizable(entry: Entry) -> bool:
    """Whether a parameter is a matrix; norms and biases stay as they are."""
    return entry.path[-1] in ("kernel", "embedding")


def quantized_kernel(
    entry: Entry,
    tensor: StoredTensor,
    view: np.ndarray,
    scheme: Scheme,
    compute: np.dtype,
    place: Place,
) -> QuantizedMatrix:
    """A matrix in 8 or 4 bits, on its devices.

    Args:
      entry: which parameter it is.
      tensor: where it was read.
      view: its values, in the layout of the parameter.
      scheme: how it is kept.
      compute: type products are taken in.
      place: lays an array out; the scales lie like the values, where they are as long.

    Raises:
      CheckpointError: some weights are infinite or not numbers.
      ConfigError: its shape does not suit the scheme.
    """
    axis = entry.axes.index("E")
    outputs = tuple(entry.axes.index(letter) for letter in entry.stored_axes[0])
    if "V" in entry.axes:
        scheme = "int8"
    try:
        values, scale = quantize(view, scheme, axis, outputs)
    except ValueError as error:
        raise CheckpointError(
            f"tensor {tensor.name!r} in {tensor.file.name} cannot be quantized: {error}; load it "
            "without quantize"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"tensor {tensor.name!r}: {error}") from error
    axes = entry.logical_axes
    short = tuple(a if n > 1 else None for a, n in zip(axes, scale.shape, strict=True))
    return QuantizedMatrix(
        values=place(values, axes), scale=place(scale, short), axis=axis, compute=compute.name
    )
