"""Tiles of a sequence, as far as what reads them cannot tell."""

import jax.numpy as jnp
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.attention import engine
from alaya_jax.cache import PageTable
from alaya_jax.cache.views import FEW_ROWS, LONG_TILE, TILE_TOKENS, Pages
from alaya_jax.index.memory import LayerMemory
from alaya_jax.query.plan import Plan

PAGE = 16


def pages_of(tokens: int) -> Pages:
    ids = jnp.arange(tokens // PAGE)
    pool = jnp.zeros((1, 4, PAGE, 2))
    return Pages(pool, pool, ids)


@pytest.mark.parametrize(
    ("tokens", "tile"),
    [(512, 512), (8192, 512), (16384, 1024), (2**16, LONG_TILE), (2**20, LONG_TILE)],
)
def test_all_of_a_long_sequence_is_read_in_large_tiles(tokens, tile):
    few, many = jnp.zeros((1, FEW_ROWS, 1, 2)), jnp.zeros((1, FEW_ROWS, 2, 2))
    pages = pages_of(tokens)
    assert pages.read_by(few).tile_tokens == tile
    assert pages.read_by(many).tile_tokens == TILE_TOKENS
    assert Pages(pages.k, pages.v, pages.ids, tile=64).read_by(few).tile_tokens == 64


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("length", [16383, 9000, 1025, 1])
def test_attention_in_large_tiles(length, in_order, rng):
    """Against numpy, for tables much wider than the sequence and lengths at the ends of tiles."""
    heads, group, dim, columns = 2, 2, 4, 16384
    k, v = rng.standard_normal((2, heads, columns // PAGE + 1, PAGE, dim)).astype(np.float32)
    q = rng.standard_normal((1, 1, heads * group, dim)).astype(np.float32)
    ids = 1 + np.arange(columns // PAGE)
    ids = ids if in_order else rng.permutation(ids)
    table = PageTable(jnp.asarray(ids[None]), jnp.asarray([length - 1]))
    memory = LayerMemory(jnp.asarray(k), jnp.asarray(v), table)
    out, counts = engine.attend(Plan(aj.Full()), jnp.asarray(q), memory, jnp.ones(1, jnp.int32))

    rows = q[0, 0].reshape(heads, group, dim).astype(np.float64)
    keys, values = (x[:, ids].reshape(heads, columns, dim)[:, :length] for x in (k, v))
    scores = np.einsum("kgd,ksd->kgs", rows, keys) * dim**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("kgs,ksd->kgd", weights / weights.sum(-1, keepdims=True), values)
    np.testing.assert_allclose(out[0, 0], want.reshape(heads * group, dim), atol=2e-6)
    assert (np.asarray(counts.attended) == length).all()
