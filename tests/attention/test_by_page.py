"""A range query by page: no critical key is lost, and few pages are kept beside theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.attention import engine, kernels
from alaya_jax.cache import PageTable
from alaya_jax.explain.truth import truth
from alaya_jax.index import Block, Flat, Sketch
from alaya_jax.index.memory import LayerMemory
from alaya_jax.models import LlamaConfig
from alaya_jax.pallas_kernels.dispatch import CPU, INTERPRET, Target
from alaya_jax.query import DIPR, Window
from alaya_jax.query.plan import Plan

K, G, D, Z, N = 1, 4, 64, 16, 512
WINDOW = Window(16, 32)
BETA = 40.0
PAGES = N // Z
CONFIG = LlamaConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=K * G,
    num_key_value_heads=K,
    head_dim=D,
    max_position_embeddings=4096,
)

# What is compiled here runs a few times.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
attend = jax.jit(
    engine.attend.__wrapped__, static_argnames=("mesh", "rules"), compiler_options=QUICK
)
judge = jax.jit(truth.__wrapped__, compiler_options=QUICK)


@jax.jit
def build(empty, k, v, ids):
    return empty.build(k, v, ids, jnp.full(PAGES, Z))


class Layer:
    """Keys of which a few, outside the window, are near the queries; the window's are not."""

    def __init__(self, seed: int, dtype=jnp.float32):
        rng = np.random.default_rng(seed)
        q = 4 * rng.standard_normal((K, 1, D)) + rng.standard_normal((K, G, D))
        k = rng.standard_normal((K, N, D))
        self.planted = rng.choice(np.arange(WINDOW.sink, N - WINDOW.recent), 6, replace=False)
        k[:, self.planted] += q.mean(1, keepdims=True) / 8
        pool = np.concatenate([np.full((K, Z, D), np.nan), k], axis=1).reshape(K, -1, Z, D)
        self.q = jnp.asarray(q.reshape(K * G, D), dtype)
        self.k = jnp.asarray(pool, dtype)
        self.v = jnp.asarray(np.roll(pool, 1, axis=-1), dtype)
        self.ids = jnp.arange(1, 1 + PAGES, dtype=jnp.int32)

    @functools.lru_cache  # noqa: B019 - layers are few, and kept by their fixture
    def index(self, spec):
        if isinstance(spec, Flat):
            return None
        empty = spec.create(CONFIG, 1 + PAGES, Z, self.k.dtype)
        return build(empty, self.k, self.v, self.ids)

    def asked(self, plan):
        table = PageTable(self.ids[None], jnp.full(1, N - 1, jnp.int32))
        covered = jnp.full(1, N, jnp.int32)
        memory = LayerMemory(self.k, self.v, table, self.index(plan.index), covered)
        return self.q[None, None], memory, jnp.ones(1, jnp.int32)

    def attended(self, plan):
        """Keys that each head attends to."""
        return np.asarray(attend(plan, *self.asked(plan))[1].attended[0, 0])

    def retrieved(self, plan):
        """Which keys outside the window [H, N] the plan attends to."""
        pages, index = (self.k, self.v, self.ids, None), self.index(plan.index)
        n = jnp.int32(N)
        return np.asarray(judge(plan, self.q, pages, n, index, n, jnp.float32(0.9)).retrieved)


@pytest.fixture(scope="module", params=range(2))
def layer(request) -> Layer:
    return Layer(request.param)


def plan(index, beta=BETA, share="head"):
    return Plan(DIPR(beta=beta, window=WINDOW), index, by="page", share=share)


@pytest.mark.parametrize("index", [Flat(), Sketch(), Sketch(2), Block("bounds")], ids=repr)
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_no_critical_key_is_lost(layer, index, beta):
    critical = layer.retrieved(Plan(DIPR(beta=beta, window=WINDOW), Flat()))
    assert critical.any(-1).all()
    assert np.isin(np.flatnonzero(critical.any(0)), layer.planted).any()
    assert not np.any(critical & ~layer.retrieved(plan(index, beta)))


@pytest.mark.parametrize("share", ["head", "group"])
def test_few_pages_are_kept_beside_those_of_critical_keys(layer, share):
    """Held against the window's best score alone, all of them were kept."""
    outside = PAGES * Z - WINDOW.sink - WINDOW.recent
    kept = layer.attended(plan(Sketch(), share=share)) - WINDOW.sink - WINDOW.recent
    exact = layer.attended(plan(Flat(), share=share)) - WINDOW.sink - WINDOW.recent
    assert np.all(kept >= exact)
    assert kept.mean() < 0.8 * outside


@functools.partial(jax.jit, static_argnames=("implementation", "target"), compiler_options=QUICK)
def by_kernels(plan, batch, implementation: str, target: Target):
    assert kernels.unfit(plan, batch, implementation, target) is None
    return kernels.attend(plan, batch, implementation, target)


def test_the_kernels_keep_the_same_pages(layer):
    asked = plan(Sketch(), share="group")
    out, counts = by_kernels(asked, kernels.LayerQueries(*layer.asked(asked)), "xla", CPU)
    want, seen = attend(asked, *layer.asked(asked))
    np.testing.assert_array_equal(counts.attended, seen.attended)
    np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.slow
def test_the_simulated_kernels_keep_the_same_pages():
    layer = Layer(0, jnp.bfloat16)
    asked = plan(Sketch(), share="group")
    batch = kernels.LayerQueries(*layer.asked(asked))
    out, counts = by_kernels(asked, batch, "mosaic_gpu", INTERPRET)
    want, seen = by_kernels(asked, batch, "xla", CPU)
    np.testing.assert_array_equal(counts.attended, seen.attended)
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), atol=2e-2)
