"""Key indexes of other papers, each as plain as its definition: a score for every key, and bytes.

In NumPy, float32, of one layer at a time; what a method stores is rounded to the type it is stored
in. A score is for choosing keys, best first; only Quest's is a bound.

    Quest       arXiv 2406.10774: of each page the least and largest number of each channel
    Landmarks   arXiv 2410.21465 (ShadowKV): the mean key of each chunk; its few outlier chunks,
                which are always read, are left out
    LowRank     the same paper: keys before RoPE, all kv heads of a layer beside each other, by
                their first singular vectors. ShadowKV restores chosen keys from these; here they
                are scored by it. int8 is not the paper's.
    Product     arXiv 2407.12820 (PQCache): each key's parts by the nearest of 2**bits centroids of
                that part, found by k-means over the context's own keys
    Labels      arXiv 2408.07092 (Double Sparsity): the channels with the largest mean |q| |k| in
                another text; at 16 bits, or at 4 between the least and largest of a key's own
"""

import dataclasses

import numpy as np
from ml_dtypes import bfloat16


@dataclasses.dataclass(frozen=True)
class Layer:
    """What indexes are made of.

    Attributes:
      k: keys after RoPE, float32 [K, N, D], token i at position i.
      frequencies: of RoPE, [D / 2], radians a token.
      weight: how much each channel matters in another text, [K, D]; see `weight_of`.
    """

    k: np.ndarray
    frequencies: np.ndarray
    weight: np.ndarray

    def pages(self, size):
        """Keys [K, P, size, D]; the last page is filled up with its last key."""
        heads, n, dim = self.k.shape
        filled = np.pad(self.k, ((0, 0), (0, -n % size), (0, 0)), mode="edge")
        return filled.reshape(heads, -1, size, dim)


def weight_of(q, k):
    """Mean |q_i| over queries [K, G, T, D] times mean |k_i| over keys [K, N, D]; [K, D]."""
    return np.abs(q).mean((1, 2)) * np.abs(k).mean(1)


def dot(q, k):
    """Scores [K, G, T, N]."""
    return np.einsum("kgtd,knd->kgtn", q, k, optimize=True)


def of_keys(pages, size, n):
    """Every key's score from its page's."""
    return np.repeat(pages, size, axis=-1)[..., :n]


@dataclasses.dataclass(frozen=True)
class Quest:
    page: int = 16

    def bytes_a_key(self, heads, n, dim):
        return 2 * 2 * dim / self.page

    def scores(self, q, layer):
        """Upper bounds: the ends are rounded outwards."""
        pages = layer.pages(self.page)
        low, high = _half_below(pages.min(2)), -_half_below(-pages.max(2))
        bound = dot(np.maximum(q, 0), high) + dot(np.minimum(q, 0), low)
        return of_keys(bound, self.page, layer.k.shape[1])


@dataclasses.dataclass(frozen=True)
class Landmarks:
    chunk: int = 8

    def bytes_a_key(self, heads, n, dim):
        return 2 * dim / self.chunk

    def scores(self, q, layer):
        means = layer.pages(self.chunk).mean(2).astype(bfloat16).astype(np.float32)
        return of_keys(dot(q, means), self.chunk, layer.k.shape[1])


@dataclasses.dataclass(frozen=True)
class LowRank:
    rank: int = 27
    bits: int = 16

    def bytes_a_key(self, heads, n, dim):
        scale = 2 if self.bits == 8 else 0
        basis = 2 * self.rank * heads * dim / n
        return (self.rank * self.bits / 8 + scale + basis) / heads

    def scores(self, q, layer):
        heads, n, dim = layer.k.shape
        angle = np.outer(np.arange(n), layer.frequencies)
        before = turned(layer.k, -angle).transpose(1, 0, 2).reshape(n, -1)
        _, vectors = np.linalg.eigh(before.T @ before)
        basis = vectors[:, -self.rank :].astype(bfloat16).astype(np.float32)
        part = before @ vectors[:, -self.rank :]
        if self.bits == 8:
            scale = (np.abs(part).max(-1, keepdims=True) / 127).astype(np.float16)
            scale = np.maximum(scale.astype(np.float32), 2.0**-24)
            part = np.clip(np.round(part / scale), -127, 127) * scale
        else:
            part = part.astype(bfloat16).astype(np.float32)
        restored = (part @ basis.T).reshape(n, heads, dim).transpose(1, 0, 2)
        return dot(q, turned(restored, angle))


@dataclasses.dataclass(frozen=True)
class Product:
    parts: int = 16
    bits: int = 8

    def bytes_a_key(self, heads, n, dim):
        return self.parts * self.bits / 8 + 2 * 2**self.bits * dim / n

    def scores(self, q, layer):
        heads, n, dim = layer.k.shape
        scores = np.zeros((*q.shape[:3], n), np.float32)
        width = dim // self.parts
        for head in range(heads):
            for part in range(self.parts):
                at = slice(part * width, (part + 1) * width)
                centroids, code = k_means(layer.k[head, :, at], 2**self.bits)
                centroids = centroids.astype(np.float16).astype(np.float32)
                scores[head] += (q[head, ..., at] @ centroids.T)[..., code]
        return scores


@dataclasses.dataclass(frozen=True)
class Labels:
    channels: int = 8
    bits: int = 16

    def bytes_a_key(self, heads, n, dim):
        ends = 4 if self.bits == 4 else 0  # float16: the least, and the distance of levels
        return self.channels * self.bits / 8 + ends

    def scores(self, q, layer):
        best = np.argsort(-layer.weight, axis=-1)[:, : self.channels]
        kept = np.take_along_axis(layer.k, best[:, None], -1)
        if self.bits == 4:
            least = kept.min(-1, keepdims=True)
            step = (kept.max(-1, keepdims=True) - least) / 15
            least, step = (x.astype(np.float16).astype(np.float32) for x in (least, step))
            step = np.maximum(step, 2.0**-24)
            kept = least + step * np.clip(np.round((kept - least) / step), 0, 15)
        else:
            kept = kept.astype(np.float16).astype(np.float32)
        return dot(np.take_along_axis(q, best[:, None, None], -1), kept)


def k_means(x, count, rounds=15, seed=0):
    """Lloyd's algorithm from points drawn at random.

    Returns:
      centroids [count, d], and the nearest of each row of x [N, d].
    """
    n, width = x.shape
    centroids = x[np.random.default_rng(seed).choice(n, count, replace=count > n)]

    def nearest():
        return np.argmin((centroids**2).sum(-1) - 2 * (x @ centroids.T), axis=-1)

    for _ in range(rounds):
        code = nearest()
        held = np.bincount(code, minlength=count)[:, None]
        sums = np.stack([np.bincount(code, x[:, i], count) for i in range(width)], -1)
        # One that nothing is near stays where it is.
        centroids = np.where(held > 0, sums / np.maximum(held, 1), centroids).astype(np.float32)
    return centroids, nearest()


def turned(x, angle):
    """Vectors [K, N, D] as RoPE turns them, by angles [N, D / 2]."""
    cos, sin = (f(angle).astype(np.float32) for f in (np.cos, np.sin))
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _half_below(x):
    """The largest float16 not above x."""
    half = x.astype(np.float16)
    below = np.where(half > x, np.nextafter(half, np.float16(-np.inf)), half)
    return below.astype(np.float32)


NAMES = {"quest": Quest, "landmarks": Landmarks, "rank": LowRank, "pq": Product, "labels": Labels}


def named(text):
    """An index from its name and numbers: quest16, landmarks8, rank27x16, pq16x8, labels28x4.

    Raises:
      ValueError: it is none.
    """
    name = text.rstrip("0123456789x")
    if name not in NAMES:
        raise ValueError(f"{text}: one of {', '.join(NAMES)}, with its numbers")
    return NAMES[name](*map(int, text.removeprefix(name).split("x")))
