"""One table of cases for every implementation of `paged_decode`, on the CPU or on a device.

A case is a set of arrays. Everything that must not be read is NaN, and ids past a list's count are
no pages at all, so that an implementation that looks where it should not gives itself away.
"""

import dataclasses
from typing import Any

import numpy as np

INF = float("inf")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes: what is compiled for. `features`: which optional arguments are given."""

    batch: int = 2
    kv_heads: int = 2
    groups: int = 3
    dim: int = 64
    size: int = 16
    listed: int = 17
    lists: int = 2
    features: tuple[str, ...] = ("starts", "low", "gap_low", "gap_high", "threshold", "key_mask")
    dtype: str = "bfloat16"


def make(sizes: Sizes, kind: str, rng: np.random.Generator) -> dict[str, Any]:
    """Numpy arrays by argument name; `kind` is a row of `KINDS`."""
    b, j, n, z = sizes.batch, sizes.lists, sizes.listed, sizes.size
    heads, pages = sizes.kv_heads * sizes.groups, b * n + 3
    pool = (sizes.kv_heads, pages, z, sizes.dim)
    q = rng.standard_normal((b, heads, sizes.dim), np.float32)
    k = rng.standard_normal(pool, np.float32)
    v = rng.standard_normal(pool, np.float32)
    count = rng.integers(1, n + 1, (b, j))
    count[0, 0] = n  # the last entry of a list, too
    length = rng.integers(n * z // 2, n * z + 1, b)
    low = rng.integers(0, z, b)
    gap_low = rng.integers(z, 2 * z, b)
    gap_high = gap_low + rng.integers(0, 2 * z, b)
    threshold = np.full((b, heads), -INF, np.float32)
    # Each sequence has pages of its own; a list names some of them, out of order if it may.
    own = 1 + rng.permutation(pages - 1)[: b * n].reshape(b, n)
    order = np.broadcast_to(np.arange(n), (b, j, n)).copy()
    if "starts" in sizes.features:
        order = rng.permuted(order, axis=-1)

    mask = np.ones((b, heads, n, z), bool)

    if kind == "mask":
        mask[:] = rng.random(mask.shape) < 0.3
        mask[:, 0] = False
    elif kind == "threshold":
        threshold[:] = rng.normal(0.0, 4.0, threshold.shape)
    elif kind == "nothing":
        count[0] = 0
        length[1] = 0
    elif kind == "below the threshold":
        threshold[:, ::2] = INF
    elif kind == "one key":
        order[:] = np.arange(n)
        count[:] = 1
        low[:], length[:], gap_high[:] = 3, 4, gap_low
    elif kind == "huge":
        q, k = q * 1e15, k * 1e15
    elif kind == "equal":
        q[:] = 0.0
    elif kind == "minus infinity":
        q[..., 0] = 1.0
        k[..., 0] = np.where(rng.random(pool[:3]) < 0.5, -INF, k[..., 0])
        k[0, ..., 0] = -INF  # every key of one kv head
    else:
        assert kind == "plain"

    ids = np.take_along_axis(np.broadcast_to(own[:, None], (b, j, n)), order, axis=2)
    present = {
        "starts": order * z,
        "low": low,
        "gap_low": gap_low,
        "gap_high": gap_high,
        "threshold": threshold,
        "key_mask": mask,
    }
    arrays = {
        "q": q,
        "page_ids": np.where(np.arange(n) < count[..., None], ids, 1 << 20),
        "count": count,
        "length": length,
        **{name: present[name] for name in sizes.features},
    }
    readable = np.zeros(pool[:3], bool)
    for row in range(b):
        for head in range(sizes.kv_heads):
            for _, page, position in listed_keys(arrays, row, head, j, z):
                readable[head, page, position % z] |= visible(arrays, row, position)
    if eight_bits(sizes):  # whole numbers, to be scaled
        arrays["k_scale"], arrays["v_scale"] = (
            np.where(readable, 0.01 + 0.01 * rng.random(pool[:3]), np.nan) for _ in "kv"
        )
        k, v = np.clip(np.round(50 * k), -127, 127), np.clip(np.round(50 * v), -127, 127)
        hidden = np.nan if "float" in sizes.dtype else 127
    else:
        hidden = np.nan
    arrays["k_pages"] = np.where(readable[..., None], k, hidden)
    arrays["v_pages"] = np.where(readable[..., None], v, hidden)
    return {
        name: x if x.dtype == bool else x.astype(np.float32 if x.dtype.kind == "f" else np.int32)
        for name, x in arrays.items()
    }


KINDS = (
    "plain",
    "threshold",
    "mask",
    "nothing",
    "below the threshold",
    "one key",
    "huge",
    "equal",
    "minus infinity",
)


def eight_bits(sizes: Sizes) -> bool:
    """Whether pages hold 8-bit numbers, with a scale for each key."""
    return sizes.dtype in ("int8", "float8_e4m3fn")


def dtype_of(name: str, sizes: Sizes) -> str | None:
    """The type an argument is given in; None: as it is."""
    if name in ("k_pages", "v_pages"):
        return sizes.dtype
    if name == "q":
        return "bfloat16" if eight_bits(sizes) else sizes.dtype
    return None


def listed_keys(
    arrays: Any, row: int, head: int, lists: int, size: int
) -> list[tuple[int, int, int]]:
    """(entry, page, position) of every key that one sequence and kv head lists."""
    which = head if lists > 1 else 0
    found = []
    for entry in range(int(arrays["count"][row, which])):
        begin = entry * size
        if "starts" in arrays:
            begin = int(arrays["starts"][row, which, entry])
        page = int(arrays["page_ids"][row, which, entry])
        found += [(entry, page, begin + offset) for offset in range(size)]
    return found


def visible(arrays: Any, row: int, position: int) -> bool:
    """Whether a position is in a sequence's range and not in its gap."""
    low = int(arrays["low"][row]) if "low" in arrays else 0
    if not low <= position < int(arrays["length"][row]):
        return False
    if "gap_low" not in arrays:
        return True
    return not int(arrays["gap_low"][row]) <= position < int(arrays["gap_high"][row])


def truth(arrays: Any, lists: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """out, lse, best, kept: key by key, in float64."""
    q, k, v = (arrays[name].astype(np.float64) for name in ("q", "k_pages", "v_pages"))
    if "k_scale" in arrays:
        k, v = k * arrays["k_scale"][..., None], v * arrays["v_scale"][..., None]
    batch, heads, dim = q.shape
    groups = heads // k.shape[0]
    out, lse = np.zeros(q.shape), np.full((batch, heads), -INF)
    best, kept = np.full((batch, heads), -INF), np.zeros((batch, heads), int)
    for row in range(batch):
        for h in range(heads):
            head = h // groups
            scores, values = [], []
            for entry, page, position in listed_keys(arrays, row, head, lists, k.shape[2]):
                if not visible(arrays, row, position):
                    continue
                at = (head, page, position % k.shape[2])
                if "key_mask" in arrays and not arrays["key_mask"][row, h, entry, at[2]]:
                    continue
                score = q[row, h] @ k[at]
                if "threshold" in arrays and not score >= arrays["threshold"][row, h]:
                    continue
                scores.append(score * dim**-0.5)
                values.append(v[at])
            kept[row, h] = len(scores)
            if scores and max(scores) > -INF:
                weights = np.exp(np.array(scores) - max(scores))
                out[row, h] = weights @ np.array(values) / weights.sum()
                best[row, h] = max(scores) / dim**-0.5
                lse[row, h] = max(scores) + np.log(weights.sum())
    return out, lse, best, kept


VARIANTS = {
    "one list, Z 16, D 128": Sizes(batch=1, groups=4, dim=128, lists=1, listed=19, features=()),
    "D 96, Z 32, float16": Sizes(
        batch=1,
        dim=96,
        size=32,
        listed=9,
        dtype="float16",
        features=("starts", "threshold", "key_mask"),
    ),
    "Z 64, 12 heads a group": Sizes(
        batch=1, kv_heads=1, lists=1, groups=12, size=64, listed=5, features=("low", "key_mask")
    ),
    "int8": Sizes(batch=1, dtype="int8"),
    "fp8, D 128, Z 32": Sizes(
        batch=1, kv_heads=1, lists=1, dim=128, size=32, listed=9, features=(), dtype="float8_e4m3fn"
    ),
}
"""Static sizes that each get one plain case; `Sizes()` gets every kind."""
