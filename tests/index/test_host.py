"""What an index knows of pages in mapped files is what it would know of them in the pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax import configs
from alaya_jax.cache.tiers import HostPages, HostPool
from alaya_jax.index import Block, Sketch
from alaya_jax.index import host as host_index
from alaya_jax.index.host import HostIndex
from alaya_jax.models import LlamaConfig

PAGES, SIZE = 40, 16


@pytest.mark.parametrize(
    "index", [Sketch(), Sketch(bits=2), Block("bounds"), Block("mean"), Block("leaders")], ids=repr
)
def test_the_same_as_in_the_pool(rng, monkeypatch, index):
    monkeypatch.setattr(host_index, "AT_ONCE", 8)
    config = LlamaConfig.from_hf(configs.load("llama-tiny"))
    shape = config.num_key_value_heads, PAGES, SIZE, config.head_dim
    k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    pages = rng.permutation(np.arange(1, PAGES))[:21]
    held = HostIndex(index.create(config, 1, SIZE), PAGES)
    births = np.arange(3, 3 + len(pages))
    host = HostPool("here", (HostPages(k, v),), pages, births)
    held.build(host, 0, pages[:5], births[:5])
    held.build(host, 0, pages, births)
    filled = jnp.full(len(pages), SIZE, jnp.int32)
    expected = index.create(config, PAGES, SIZE).build(k, v, jnp.asarray(pages, jnp.int32), filled)
    for got, want in zip(jax.tree.leaves(held.index), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(got)[:, pages], np.asarray(want)[:, pages])
        others = np.setdiff1d(np.arange(1, PAGES), pages)
        assert not np.asarray(got)[:, others].any(), "memory of pages nobody asked for"


def test_a_page_is_looked_at_once_for_each_birth(rng, monkeypatch):
    config = LlamaConfig.from_hf(configs.load("llama-tiny"))
    shape = config.num_key_value_heads, PAGES, SIZE, config.head_dim
    k = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    held, births = HostIndex(Sketch().create(config, 1, SIZE), PAGES), np.full(8, 5)
    host = HostPool("here", (HostPages(k, k),), np.arange(1, 10), np.full(9, 5))
    held.build(host, 0, np.arange(1, 9), births)
    monkeypatch.setattr(host_index, "_of_pages", lambda *_: 1 / 0)
    held.build(host, 0, np.arange(1, 9), births)
    for pages, births in ((np.arange(1, 10), np.full(9, 5)), (np.arange(1, 9), np.full(8, 6))):
        with pytest.raises(ZeroDivisionError):
            held.build(host, 0, pages, births)
