"""Paged keys for the tests of indexes: random, clustered, and of a real model."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.attention.kept import Kept, scores_listed
from alaya_jax.attention.retrieve import pivot
from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.index import MISS, Flat, SketchLayer
from alaya_jax.index.select import in_range

compiled_build = jax.jit(SketchLayer.build)


@functools.partial(jax.jit, static_argnames="miss")
def compiled_answers(layer, k_pages, ids, q, low, high, beta, seed, miss):
    """All that a test asks, in one program a shape."""
    pages = Pages(k_pages, k_pages, ids)
    keys = KeyRange(low, high)
    scan = layer.scan(q, pages, keys, miss)
    best = jnp.maximum(seed, pivot(q, pages, scan))
    error = jnp.broadcast_to(scan.error, scan.estimate.shape)
    kept = Kept(pages, keys, in_range(scan.estimate + error, best, beta))
    true = Flat().scan(q, pages, keys).estimate
    listed, columns = scores_listed(q, kept, pages.columns)
    place = jax.vmap(lambda scores, at, new: scores.at[..., at].max(new))
    found = place(jnp.full(true.shape, -jnp.inf), columns, listed)
    return Answers(true, scan.estimate, error, found)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Answers:
    """True scores, what a scan says of them, and the exact ones of DIPR's candidates."""

    true: np.ndarray
    estimate: np.ndarray
    error: np.ndarray
    found: np.ndarray


@dataclasses.dataclass
class Paged:
    """Keys [K, S, D] of one sequence in scattered pages of a poisoned pool, and queries."""

    k: np.ndarray
    q: np.ndarray
    page_size: int
    seed: int = 0

    def __post_init__(self):
        heads, n, dim = self.k.shape
        used = -(-n // self.page_size)
        rng = np.random.default_rng(self.seed)
        ids = 1 + rng.permutation(used + 5)[:used]
        pool = np.full((heads, used + 6, self.page_size, dim), np.nan, np.float32)
        for j in range(n):
            pool[:, ids[j // self.page_size], j % self.page_size] = self.k[:, j]
        self.k_pages = jnp.asarray(pool)
        self.ids = jnp.asarray(np.concatenate([ids, [0, 0]]), jnp.int32)  # the table is wider
        self.pages = Pages(self.k_pages, self.k_pages, self.ids)

    @property
    def length(self) -> int:
        return self.k.shape[1]

    def filled(self, length):
        """Tokens that each page holds once the sequence has so many."""
        return jnp.clip(length - self.page_size * jnp.arange(len(self.ids)), 0, self.page_size)

    def empty(self, bits):
        heads, pages, size, dim = self.k_pages.shape

        def stale(dtype, *shape):  # what a page held before must not matter
            return jnp.full((heads, pages, *shape), 77, dtype)

        return SketchLayer(
            stale(jnp.uint8, size, dim * bits // 8),
            stale(jnp.float16, size),
            stale(jnp.float16, size),
            stale(jnp.int8, dim),
            stale(jnp.float16),
            stale(jnp.int8, dim),
            stale(jnp.float16),
            stale(jnp.float16, 2),
        )

    def sketch(self, bits=4):
        return self.build(self.empty(bits), self.ids, self.filled(self.length))

    def build(self, layer, ids, filled, k_pages=None):
        k_pages = self.k_pages if k_pages is None else k_pages
        return compiled_build(layer, k_pages, k_pages, ids, filled)

    def ask(self, layer, beta=0.0, seed=-np.inf, low=0, high=None, miss=MISS):
        """Of keys low..high: true scores, estimates, errors, and candidates' exact scores."""
        heads, group, t, _ = self.q.shape
        rows = (np.full(t, low, np.int32), np.full(t, high or self.length, np.int32))
        beta = np.asarray(beta, np.float32)
        seed = np.broadcast_to(np.asarray(seed, np.float32), (heads, group, t))
        out = compiled_answers(layer, self.k_pages, self.ids, self.q, *rows, beta, seed, miss)
        return jax.tree.map(np.asarray, out)

    def scores(self):
        """float64 [K, G, T, S]."""
        return np.einsum("kgtd,ksd->kgts", self.q.astype(np.float64), self.k.astype(np.float64))


def random_keys(rng, heads=3, n=1021, dim=64, group=3, t=8, page_size=16):
    k = rng.standard_normal((heads, n, dim)) + 2 * rng.standard_normal((heads, 1, dim))
    return Paged(k.astype(np.float32), _queries(rng, heads, group, t, dim), page_size)


def clustered_keys(rng, heads=3, n=1021, dim=64, group=3, t=8, page_size=16):
    """Runs of keys around few centres, some of them equal, of lengths over two decades."""
    centres = rng.standard_normal((heads, 12, dim))
    runs = np.repeat(rng.integers(0, 12, -(-n // 7)), 7)[:n]
    noise = rng.standard_normal((heads, n, dim)) * (rng.random((heads, n, 1)) > 0.2)
    k = (centres[:, runs] + 0.1 * noise) * 10 ** rng.uniform(-1, 1, (heads, n, 1))
    q = 3 * centres[:, rng.integers(0, 12, (group, t))] + _queries(rng, heads, group, t, dim)
    return Paged(k.astype(np.float32), q.astype(np.float32), page_size)


def _queries(rng, heads, group, t, dim):
    return 3 * rng.standard_normal((heads, group, t, dim)).astype(np.float32)


def real_keys(layer):
    """1,024 keys of SmolLM2-135M, the last 8 queries (benchmarks/sketch_recall.py --save-keys)."""
    with np.load(Path(__file__).with_name("smollm2_keys.npz")) as file:
        k, q = (file[name][layer].astype(np.float32) for name in ("k", "q"))
    return Paged(k.reshape(k.shape[0], -1, k.shape[-1]), q, 16)


KEYS = {
    "random": random_keys,
    "clustered": clustered_keys,
    "real 6": lambda rng: real_keys(0),
    "real 20": lambda rng: real_keys(1),
}


@pytest.fixture(params=KEYS)
def paged(request, rng):
    """Keys of each kind."""
    return KEYS[request.param](rng)


@pytest.fixture(name="make_keys", scope="session")
def make_keys_():
    """Keys of any shape, random or clustered."""

    def make(rng, kind="random", scale=1.0, **shape):
        paged = KEYS[kind](rng, **shape)
        return dataclasses.replace(paged, k=(scale * paged.k).astype(np.float32))

    return make


@pytest.fixture(scope="session")
def all_keys():
    """Makers of keys by kind."""
    return KEYS


@pytest.fixture(scope="session")
def build():
    """`SketchLayer.build`, compiled."""
    return compiled_build


@pytest.fixture(scope="session")
def answers():
    """The program behind `Paged.ask`."""
    return compiled_answers
