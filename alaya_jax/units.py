"""Sizes of memory as people write them."""

import re

import numpy as np

from alaya_jax.errors import RequestError

_UNITS = {"": 1, "B": 1, "kB": 1000} | {
    f"{prefix}{ending}": base**power
    for ending, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


def bytes_of(size: int | str, setting: str) -> int:
    """Bytes, from a number of them or from "8GiB".

    Args:
      size: what was given.
      setting: for the error, such as "Budget(device=...)".

    Raises:
      RequestError: no size, or not above 0.
    """
    setting = setting.replace("...", repr(size))
    if isinstance(size, int | np.integer) and not isinstance(size, bool):
        count = int(size)
    else:
        number = r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?i?B?)\s*"
        match = re.fullmatch(number, size) if isinstance(size, str) else None
        if not match or match[2] not in _UNITS:
            raise RequestError(f"{setting}: use bytes, or e.g. '8GiB'")
        count = int(float(match[1]) * _UNITS[match[2]])
    if count <= 0:
        raise RequestError(f"{setting}: must be positive")
    return count
