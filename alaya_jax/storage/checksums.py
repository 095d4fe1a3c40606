"""Checksums of pages: XXH3, one number for all kv heads of a page of one layer and kind.

They find accidents, not forgeries. Each is salted with the page's slot, layer and kind, and with
the write that made it: what is right in itself but lies in a wrong place, or is what lay there
before, is noticed too.
"""

import numpy as np
from xxhash import xxh3_64_intdigest

_ODD = 0x9E3779B97F4A7C15


def of_bytes(data: bytes | memoryview, salt: int = 0) -> int:
    """64 bits of anything."""
    return xxh3_64_intdigest(data, salt)


def of_pages(
    data: np.ndarray, slots: np.ndarray, births: np.ndarray, layer: int, kind: int
) -> np.ndarray:
    """Checksums of pages as they lie in a file, u32 [m].

    Args:
      data: the pages' keys or values [K, m, Z, D], of any dtype; each head's are one run of bytes.
      slots, births: of each page, i32 and i64 [m].
      layer, kind: which; kind 0 are keys, 1 values.
    """
    heads, count = data.shape[:2]
    total = np.zeros(count, np.uint64)
    size = data[0, 0].nbytes if count else 0
    for head in range(heads if count else 0):
        piece = memoryview(data[head].reshape(-1).view(np.uint8))
        found = [xxh3_64_intdigest(piece[i : i + size]) for i in range(0, count * size, size)]
        # Another odd number a head: heads that change places change the sum.
        total += np.array(found, np.uint64) * np.uint64((2 * head + 1) * _ODD % 2**64)
    place = _mixed(births.astype(np.uint64))
    place = _mixed(place ^ slots.astype(np.uint64))
    place = _mixed(place ^ np.uint64(2 * layer + kind))
    return (_mixed(total ^ place) >> np.uint64(32)).astype(np.uint32)


def of_rows(rows: np.ndarray, slots: np.ndarray, births: np.ndarray, salt: int) -> np.ndarray:
    """Checksums of what is known of pages, u64 [m].

    Args:
      rows: bytes of each page, u8 [m, n].
      slots, births: of each page, i32 and i64 [m].
      salt: 64 bits, another one for each place that such a page has.
    """
    seeds = _mixed(births.astype(np.uint64) ^ np.uint64(salt))
    seeds = _mixed(seeds ^ slots.astype(np.uint64))
    data, size = memoryview(rows.reshape(-1)), rows.shape[1]
    found = [
        xxh3_64_intdigest(data[i * size : (i + 1) * size], int(seed))
        for i, seed in enumerate(seeds)
    ]
    return np.array(found, np.uint64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """A permutation of 64 bits in which each bit moves all others (splitmix64's last step)."""
    x = x + np.uint64(_ODD)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
