"""What is given to be stored, looked at before it is believed."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from alaya_jax.errors import RequestError
from alaya_jax.storage.interface import ContextHeader, Source


def token_ids(tokens: Any) -> np.ndarray:
    """Ids, i32 [n]. Raises RequestError where they are not."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise RequestError(
            f"tokens are {ids.dtype} {list(ids.shape)}; give whole numbers [n], at least one"
        )
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise RequestError(f"token ids reach from {ids.min()} to {ids.max()}; use 0 to 2**31 - 1")
    return ids.astype(np.int32)


def whole_layers(
    kv: Source | Iterable[Any],
    start: int,
    header: ContextHeader,
    tokens: np.ndarray,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys and values [K, n - start, D] of each of the header's layers, no more and no fewer.

    Raises:
      RequestError: they have other shapes or dtypes.
    """
    layers = iter(kv(start)) if callable(kv) else (_from(start, pair) for pair in kv)
    shape = (header.num_kv_heads, len(tokens) - start, header.row_width)
    for layer in range(header.num_layers):
        pair = next(layers, None)
        if pair is None:
            raise RequestError(
                f"kv ended after {layer} layers; the header says {header.num_layers}"
            )
        try:
            k, v = pair
        except (TypeError, ValueError) as error:
            raise RequestError(f"kv of layer {layer} is no pair of keys and values") from error
        yield (
            _checked(k, f"k of layer {layer}", header.row_dtype, shape),
            _checked(v, f"v of layer {layer}", header.row_dtype, shape),
        )
        if progress is not None:
            progress(layer + 1, header.num_layers)
    if next(layers, None) is not None:
        raise RequestError(f"kv goes on after the {header.num_layers} layers of the header")


def _from(start: int, pair: Any) -> Any:
    """A layer's keys and values without their first tokens; what is wrong with them stays so."""
    try:
        return tuple(half[:, start:] if half.ndim == 3 else half for half in map(np.asarray, pair))
    except TypeError:
        return pair


def _checked(half: Any, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(half)
    if array.shape != shape or array.dtype != dtype:
        raise RequestError(
            f"{name} is {array.dtype} {list(array.shape)}; the header and the "
            f"tokens say {dtype} {list(shape)} [K, n, D]"
        )
    return array
