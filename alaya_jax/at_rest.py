"""Keys and values at rest in 8 bits: a row for each token and kv head, D codes and their scale.

The codes are int8, or float8_e4m3; the scale is a bfloat16 with which the largest number of the
row becomes the largest code. A row lies together, so that whoever reads a token reads all of it.
"""

from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from alaya_jax.errors import RequestError

StoreDtype = Literal["int8", "fp8"]
"""What keys and values can be stored in, beside the dtype that they were computed in."""

STORE_DTYPES: tuple[StoreDtype, ...] = get_args(StoreDtype)

CODES: dict[str, np.dtype] = {
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""What the codes of a row are."""

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_SCALE = np.dtype(ml_dtypes.bfloat16)
_AT_ONCE = 1 << 14
"""Tokens of a head that are in float32 at a time."""


def row_bytes(dim: int) -> int:
    """The bytes of a row of `dim` numbers."""
    return dim + _SCALE.itemsize


def encoded(x: np.ndarray, kind: StoreDtype) -> np.ndarray:
    """Keys or values [K, n, D] as rows, u8 [K, n, D + 2].

    Raises:
      RequestError: a number is not finite, or so large that its row could not be read back.
    """
    heads, count, dim = x.shape
    largest = float(ml_dtypes.finfo(x.dtype).max) * 0.99  # a code may be rounded up
    rows = np.empty((heads, count, row_bytes(dim)), np.uint8)
    for head in range(heads):
        for first in range(0, count, _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            part = x[head, some].astype(np.float32)
            most = np.abs(part).max(axis=-1, keepdims=True)
            if not (most <= largest).all():
                raise RequestError(
                    f"keys or values that reach {most.max():g} cannot be stored in {kind}; store "
                    "them with store_dtype=None"
                )
            scale = _rounded_up(most / np.float32(_LARGEST[kind]))
            codes = part / np.where(scale > 0, scale, 1).astype(np.float32)
            codes = np.rint(codes) if kind == "int8" else codes
            codes = np.where(scale > 0, codes, 0).astype(CODES[kind])
            rows[head, some, :dim] = codes.view(np.uint8)
            rows[head, some, dim:] = scale.view(np.uint8)
    return rows


def decoded(rows: Any, kind: StoreDtype, dtype: Any) -> Any:
    """The numbers of rows [..., D + 2] as `dtype` [..., D]; of numpy's arrays or, with the same
    bits, of JAX's.
    """
    dim = rows.shape[-1] - _SCALE.itemsize
    codes = rows[..., :dim].view(CODES[kind]).astype(np.float32)
    scale = rows[..., dim:].view(_SCALE).astype(np.float32)
    return (codes * scale).astype(dtype)


def _rounded_up(x: np.ndarray) -> np.ndarray:
    """The least bfloat16 that is no less than a float32 from 0 on; below the least normal one, 0,
    because devices take such numbers for 0.
    """
    bits = x.astype(np.float32).view(np.uint32)
    up = ((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
    return np.where(x < np.finfo(np.float32).tiny, np.uint16(0), up).view(_SCALE)
