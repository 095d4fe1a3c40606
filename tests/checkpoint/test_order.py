"""In which order files are filled, found out from which file holds which tensor."""

import random

import pytest

from alaya_jax.checkpoint.order import order_of, place

MODULES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{name}.weight"
        for i in (0, 1, 2, 10)
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    ),
    "model.norm.weight",
    "lm_head.weight",
]


def shuffled():
    names = list(MODULES)
    random.Random(5).shuffle(names)
    return names


def test_modules_in_the_order_in_which_a_llama_has_them():
    assert sorted(shuffled(), key=lambda name: place(name, "modules")) == MODULES


def test_a_bias_follows_its_weight_and_unknown_names_come_last():
    names = ["something.else", "model.layers.0.self_attn.q_proj.bias", *MODULES[:3]]
    placed = sorted(names, key=lambda name: place(name, "modules"))
    assert placed[:3] == [*MODULES[:2], "model.layers.0.self_attn.q_proj.bias"]
    assert placed[-1] == "something.else"


def test_names_sort_numbers_as_numbers():
    placed = sorted(shuffled(), key=lambda name: place(name, "names"))
    assert placed[0] == "lm_head.weight"
    layers = [int(name.split(".")[2]) for name in placed if name.startswith("model.layers.")]
    assert layers == sorted(layers)


@pytest.mark.parametrize("order", ["names", "modules"])
@pytest.mark.parametrize("count", [3, 7])
def test_the_order_is_found_in_the_files(order, count):
    names = sorted(MODULES, key=lambda name: place(name, order))
    each = -(-len(names) // count)
    files = {name: f"model-{1 + i // each:05}.safetensors" for i, name in enumerate(names)}
    assert order_of(dict(sorted(files.items()))) == order


def test_one_file_says_nothing_and_is_taken_as_sorted():
    assert order_of(dict.fromkeys(MODULES, "model.safetensors")) == "names"
