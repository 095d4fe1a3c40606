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
