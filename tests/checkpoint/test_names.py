"""The name table covers the model exactly, and its layouts invert."""

import jax
import numpy as np
import pytest

from alaya_jax.checkpoint.names import entries, rope_from_gguf, rope_to_gguf
from alaya_jax.models import llama

VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one kv head": {"num_key_value_heads": 1},
}


@pytest.fixture(params=VARIANTS)
def config(request, make_config):
    return make_config(**VARIANTS[request.param])


def leaves(tree, **kwargs) -> dict:
    flat, _ = jax.tree.flatten_with_path(tree, **kwargs)
    return {tuple(key.key for key in path): leaf for path, leaf in flat}


def test_table_is_the_model(config):
    model = leaves(llama.abstract_params(config))
    assert {e.path: e.shape for e in entries(config)} == {p: x.shape for p, x in model.items()}


def test_logical_axes_are_the_models(config):
    axes = leaves(llama.logical_axes(config), is_leaf=lambda x: isinstance(x, tuple))
    assert {e.path: e.logical_axes for e in entries(config)} == axes


def test_names_are_unique_and_shapes_are_hf(config, make_tensors):
    table = entries(config)
    assert {e.hf: e.stored_shape for e in table} == {
        name: x.shape for name, x in make_tensors(config).items()
    }
    for fmt in ("gguf", "meta", "orbax"):
        assert len({e.name(fmt) for e in table}) == len(table)


@pytest.mark.parametrize("fmt", ["hf", "gguf", "meta", "orbax"])
def test_layouts_invert(config, fmt, rng):
    for entry in entries(config):
        stored = rng.standard_normal(entry.shape_in(fmt))
        param = entry.to_params(stored, fmt)
        assert param.shape == entry.shape
        np.testing.assert_array_equal(entry.to_stored(param, fmt), stored)


@pytest.mark.parametrize("fmt", ["gguf", "meta"])
def test_other_formats_differ_in_q_and_k_alone(config, fmt, rng):
    for entry in entries(config):
        stored = rng.standard_normal(entry.stored_shape)
        same = np.array_equal(entry.to_params(stored, fmt), entry.to_params(stored, "hf"))
        assert same == (set(entry.path).isdisjoint({"q", "k"})), entry.path


def test_rope_rows_pair_neighbours():
    """HF pairs (d, d + D/2); GGUF has the two side by side."""
    heads, head_dim = 3, 8
    rows = np.arange(heads * head_dim)
    stored = rope_to_gguf(rows, heads).reshape(heads, head_dim // 2, 2)
    assert stored[1, 2].tolist() == [8 + 2, 8 + 2 + 4]
    np.testing.assert_array_equal(rope_from_gguf(stored.reshape(-1), heads), rows)
