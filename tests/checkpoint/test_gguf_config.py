"""Formulas of GGUF metadata against transformers' own, written out again."""

import math

import numpy as np
import pytest

from alaya_jax.checkpoint.gguf_config import llama3_divisors, read_config, yarn_magnitude
from alaya_jax.errors import ConfigError

NUMBERS = {
    "llama.block_count": 2,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": 4,
    "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.vocab_size": 48,
}


def read(changes):
    return read_config(NUMBERS | changes, {}, np.dtype(np.float32))


def test_divisors_frequency_by_frequency():
    """As `_compute_llama3_parameters` of transformers: three bands of wavelengths."""
    theta, dim, factor, low, high, length = 10_000.0, 64, 8.0, 1.0, 4.0, 512
    found = llama3_divisors(theta, dim, factor, low, high, length)
    for i, divisor in enumerate(found):
        wavelength = 2 * math.pi * theta ** (2 * i / dim)
        if wavelength < length / high:
            want = 1.0
        elif wavelength > length / low:
            want = factor
        else:
            smooth = (length / wavelength - low) / (high - low)
            want = 1 / ((1 - smooth) / factor + smooth)
        assert divisor == pytest.approx(want, rel=1e-12)
    assert {1.0, factor} < set(found.tolist()), "all three bands are there"


def test_the_magnitude_of_yarn():
    assert yarn_magnitude(1.0) == 1.0
    assert yarn_magnitude(math.e**2) == pytest.approx(1.2)


def test_numbers_stored_in_float32_are_the_decimal_ones():
    assert read({}).rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"llama.block_count": None}, "'llama.block_count' is missing or no number"),
        ({"llama.expert_count": 8}, "'llama.expert_count' = 8 is not supported"),
        ({"llama.something": 1}, r"not understood: \['llama.something'\]"),
        ({"llama.feed_forward_length": [64, 96]}, "its own 'intermediate_size'"),
        (
            {"llama.attention.key_length": 16, "llama.rope.dimension_count": 8},
            r"differ \(\[8, 16\]\)",
        ),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
    ],
)
def test_what_is_refused_is_named(changes, said):
    with pytest.raises(ConfigError, match=said):
        read(changes)
