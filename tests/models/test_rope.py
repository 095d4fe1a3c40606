"""Rotation, against the definition; and the whole model under JAX's strictest setting of ranks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax.models import llama, rope
from alaya_jax.models.config import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    attention_bias=True,
)


def test_a_pair_is_turned_by_its_position_times_its_frequency():
    positions = np.array([[0, 1, 50], [7, 3, 2]])
    inverse, factor = rope.inverse_frequencies(CONFIG)
    x = np.random.default_rng(0).standard_normal((2, 3, 2, 8)).astype(np.float32)
    got = rope.rotate(jnp.asarray(x), *rope.rotation(jnp.asarray(positions), inverse, factor))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * inverse)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_needs_no_rank_promotion(tied):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    tokens, positions = jnp.zeros((2, 3), jnp.int32), jnp.arange(6).reshape(2, 3)

    def logits_of(key):
        params = llama.init_params(config, key)
        return llama.forward(params, config, tokens, positions, llama.causal_attend)[0]

    with jax.numpy_rank_promotion("raise"):  # which speaks while the program is traced
        logits = jax.eval_shape(logits_of, jax.random.key(0))
    assert logits.shape == (2, 3, 32)
