"""Configs that describe no model are refused, by the name of the field."""

import math

import pytest

from alaya_jax.errors import ConfigError
from alaya_jax.models.config import LlamaConfig

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        *(("theta", {"rope_theta": x}) for x in (0, -5.0, math.nan, math.inf)),
        *(("rms_norm_eps", {"rms_norm_eps": x}) for x in (0.0, -1.0, math.nan, math.inf)),
        *(("factor", {"rope_scaling": {"type": "linear", "factor": x}}) for x in (0, math.nan, -2)),
        ("factor", {"rope_scaling": {"type": "dynamic", "factor": 0.0}}),
        ("head_dim", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}),
        ("theta", {"rope_theta": 1.0, "rope_scaling": YARN}),
        ("factor", {"rope_scaling": YARN | {"factor": math.inf}}),
        ("attention_factor", {"rope_scaling": YARN | {"attention_factor": 0.0}}),
        ("beta_fast", {"rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 32.0}}),
        ("beta_slow", {"rope_scaling": YARN | {"beta_slow": 0}}),
        ("mscale", {"rope_scaling": YARN | {"mscale": math.nan}}),
        *(
            ("original_max_position", {"rope_scaling": r | {"original_max_position_embeddings": n}})
            for r in (YARN, LLAMA3)
            for n in (0, -8)
        ),
        ("low_freq_factor", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}),
        ("high_freq_factor", {"rope_scaling": LLAMA3 | {"high_freq_factor": math.nan}}),
    ],
)
def test_numbers_that_make_no_model(field, fields):
    with pytest.raises(ConfigError, match=field):
        LlamaConfig.from_hf(SIZES | fields)


def test_numbers_that_do():
    for fields in ({"rope_theta": 1.0}, {"rope_scaling": YARN | {"mscale": 0.0, "factor": 0.5}}):
        LlamaConfig.from_hf(SIZES | fields)


QWEN = {"rope_type": "yarn", "factor": 4.0}
VICUNA = {"type": "linear", "factor": 4.0}
ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("fields", "declared", "longest"),
    [
        ({}, 128, 128),
        # The length before stretching, said or left to transformers' rule.
        ({"rope_scaling": QWEN}, 512, 512),
        ({"rope_scaling": QWEN | {ORIGINAL: 128}}, 512, 512),
        ({"rope_parameters": {"rope_theta": 1e6, ORIGINAL: 128} | QWEN}, 512, 512),
        ({"rope_scaling": QWEN, ORIGINAL: 128}, 512, 512),
        # That after stretching, or something between.
        ({"rope_scaling": QWEN | {ORIGINAL: 32}}, 128, 128),
        ({"rope_scaling": {"rope_type": "yarn", ORIGINAL: 48}}, 128, 128),  # factor 128/48
        ({"rope_scaling": QWEN | {ORIGINAL: 64}}, 128, 256),
        # Linear scaling has no rule: what is said counts, the rest can be asked for.
        ({"rope_scaling": VICUNA}, 128, 512),
        ({"rope_scaling": VICUNA, "max_sequence_length": 512}, 512, 512),
        ({"rope_scaling": VICUNA | {ORIGINAL: 128}}, 512, 512),
        ({"rope_scaling": VICUNA | {ORIGINAL: 32}}, 128, 128),
        ({"rope_scaling": VICUNA, ORIGINAL: 32}, 128, 128),
        ({"max_sequence_length": 512}, 128, 128),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 256, 256),
        ({"rope_scaling": LLAMA3 | {ORIGINAL: 16}}, 128, 128),
        ({"rope_scaling": LLAMA3 | {ORIGINAL: 32}}, 128, 256),
    ],
)
def test_the_length_that_is_served(fields, declared, longest):
    config = LlamaConfig.from_hf(SIZES | fields)
    assert (config.max_length, config.longest) == (declared, longest)
    assert LlamaConfig.from_hf(config.to_hf()) == config
    apart = config.lengths_apart()
    assert (apart.max_length, apart.longest) == (declared, longest)


def test_lengths_are_no_part_of_a_fingerprint():
    """What was stored before the lengths were read is found again."""
    of = [
        LlamaConfig.from_hf(SIZES | {"rope_scaling": VICUNA | more} | beside).in_digest()
        for more in ({}, {ORIGINAL: 32})
        for beside in ({}, {"max_sequence_length": 512})
    ]
    assert all(digest == of[0] for digest in of)
    assert of[0] == LlamaConfig.from_hf(SIZES | {"rope_scaling": VICUNA}).to_hf()


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("max_sequence_length", {"max_sequence_length": 0}),
        (ORIGINAL, {"rope_scaling": QWEN | {ORIGINAL: 64}, ORIGINAL: 32}),
    ],
)
def test_lengths_that_make_no_model(field, fields):
    with pytest.raises(ConfigError, match=field):
        LlamaConfig.from_hf(SIZES | fields)
