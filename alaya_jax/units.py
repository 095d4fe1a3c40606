"""Sizes of memory as people write them, and numbers as they read them."""

import numbers
import re
from typing import Any

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
    if isinstance(size, numbers.Integral) and not isinstance(size, bool):
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


def count(number: float) -> str:
    """Keys: 1,234, or one decimal below ten."""
    return f"{number:,.1f}" if number < 10 and number != int(number) else f"{number:,.0f}"


def seconds(number: float) -> str:
    """Time with a unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if number * factor >= 1:
            return f"{number * factor:.3g} {unit}"
    return f"{number * 1e6:.0f} us"


def nbytes(number: float) -> str:
    """Bytes with a unit that fits, powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def share(number: Any) -> str:
    """A share of the mass; "-" where it is not known."""
    return "-" if number is None else f"{number:.3f}"
