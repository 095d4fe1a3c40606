"""How much of their beginning two rows of token ids share."""

import numpy as np


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """How many token ids two rows have in common, from the first on."""
    n = min(len(one), len(other))
    differ = one[:n] != other[:n]
    return int(np.argmax(differ)) if differ.any() else n
