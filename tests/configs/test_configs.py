"""The shipped architectures describe the models they are named after."""

import pytest

from alaya_jax import configs
from alaya_jax.errors import ConfigError
from alaya_jax.models.config import LlamaConfig

# The totals the published safetensors files state. Tied embeddings are counted once.
PUBLISHED_TOTALS = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
}


def count_parameters(hf: dict) -> int:
    """Counts the weights of a bias-free Llama from the fields of its config.json."""
    E, F, V = hf["hidden_size"], hf["intermediate_size"], hf["vocab_size"]
    H, K = hf["num_attention_heads"], hf["num_key_value_heads"]
    D = hf.get("head_dim", E // H)
    attention = E * H * D + 2 * E * K * D + H * D * E
    layer = attention + 3 * E * F + 2 * E
    embeddings = V * E * (1 if hf["tie_word_embeddings"] else 2)
    return hf["num_hidden_layers"] * layer + embeddings + E


@pytest.mark.smoke
@pytest.mark.parametrize("name", PUBLISHED_TOTALS)
def test_parameter_count_is_the_published_one(name):
    assert count_parameters(configs.load(name)) == PUBLISHED_TOTALS[name]


def test_every_published_architecture_is_counted():
    assert set(configs.names()) == {*PUBLISHED_TOTALS, "llama-tiny"}


@pytest.mark.smoke
@pytest.mark.parametrize("name", configs.names())
def test_model_config_reads_it_field_by_field(name):
    hf = configs.load(name)
    config = LlamaConfig.from_hf(hf)
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings"
    )
    assert {f: getattr(config, f) for f in same.split()} == {f: hf[f] for f in same.split()}
    assert config.head_dim == hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    assert config.dtype == hf["torch_dtype"]
    assert config.rope.theta == hf["rope_theta"]
    scaling = hf["rope_scaling"] or {"rope_type": "default"}
    assert {f: getattr(config.rope, f) for f in scaling} == scaling
    eos = hf["eos_token_id"]
    assert config.eos_token_ids == tuple(eos if isinstance(eos, list) else [eos])
    assert config.bos_token_id == hf["bos_token_id"]


def test_each_load_is_a_copy_of_its_own():
    configs.load("llama-tiny")["vocab_size"] = 1
    assert configs.load("llama-tiny")["vocab_size"] == 256


@pytest.mark.parametrize("name", ["llama-4", "", "../pyproject", "Llama-3-8B"])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"llama-3-8b, .*smollm2-135m"):
        configs.load(name)
