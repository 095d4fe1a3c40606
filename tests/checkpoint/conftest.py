"""Tiny random checkpoints, written by the formats' own libraries from names spelled out again."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from alaya_jax.models.config import LlamaConfig

Tensors = dict[str, np.ndarray]

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture
def make_config() -> Callable[..., LlamaConfig]:
    def make(**changes) -> LlamaConfig:
        sizes = {
            "vocab_size": 48,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
        }
        return LlamaConfig(**sizes | changes)

    return make


@pytest.fixture
def make_tensors(rng) -> Callable[..., Tensors]:
    """HF names and shapes of every tensor of a config, filled with random numbers."""

    def make(c: LlamaConfig, dtype=np.float32) -> Tensors:
        e, f = c.hidden_size, c.intermediate_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        linear = {
            "self_attn.q_proj": (q, e, c.attention_bias),
            "self_attn.k_proj": (kv, e, c.attention_bias),
            "self_attn.v_proj": (kv, e, c.attention_bias),
            "self_attn.o_proj": (e, q, c.attention_bias),
            "mlp.gate_proj": (f, e, c.mlp_bias),
            "mlp.up_proj": (f, e, c.mlp_bias),
            "mlp.down_proj": (e, f, c.mlp_bias),
        }
        shapes = {"model.embed_tokens.weight": (c.vocab_size, e), "model.norm.weight": (e,)}
        if not c.tie_word_embeddings:
            shapes["lm_head.weight"] = (c.vocab_size, e)
        for i in range(c.num_hidden_layers):
            layer = f"model.layers.{i}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{layer}{norm}.weight"] = (e,)
            for name, (rows, columns, bias) in linear.items():
                shapes[f"{layer}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{layer}{name}.bias"] = (rows,)
        return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}

    return make


@pytest.fixture
def write_hf(tmp_path) -> Callable[..., Path]:
    def write(config: LlamaConfig, tensors: Tensors, shards: int = 0, **extra) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config.to_hf() | extra))
        for file in tmp_path.glob("model*.safetensors*"):  # of a call before
            file.unlink()
        if not shards:
            save_file(tensors, tmp_path / "model.safetensors")
            return tmp_path
        names, weight_map = sorted(tensors), {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            save_file({name: tensors[name] for name in names[i::shards]}, tmp_path / file)
            weight_map |= dict.fromkeys(names[i::shards], file)
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return write


@pytest.fixture
def write_gguf(tmp_path) -> Callable[..., Path]:
    """Writes HF tensors as a GGUF file, matrices quantized to `kind`."""

    def write(
        config: LlamaConfig,
        tensors: Tensors,
        kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        arch: str = "llama",
        keys: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    ) -> Path:
        path = tmp_path / f"model-{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, arch)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope.theta)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        keys(writer)
        for name, value in tensors.items():
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            for part, n in heads.items():
                if part in name:  # as llama.cpp's converter permutes
                    split = value.reshape(n, 2, value.shape[0] // n // 2, *value.shape[1:])
                    value = split.swapaxes(1, 2).reshape(value.shape)
            stem, suffix = name.removeprefix("model.layers.").rsplit(".", 1)
            number, _, rest = stem.partition(".")
            stem = f"blk.{number}.{GGUF_NAMES[rest]}" if number.isdigit() else GGUF_NAMES[stem]
            own = kind if value.ndim > 1 else gguf.GGMLQuantizationType.F32
            data = value if value.dtype == np.uint8 else gguf.quants.quantize(value, own)
            writer.add_tensor(f"{stem}.{suffix}", data, raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def as_params() -> Callable[[LlamaConfig, Tensors], dict]:
    """The parameter tree of HF tensors, each layout written out by hand."""

    def convert(c: LlamaConfig, t: Tensors) -> dict:
        heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        params = {
            "embed": {"embedding": t["model.embed_tokens.weight"]},
            "norm": {"scale": t["model.norm.weight"]},
        }
        if not c.tie_word_embeddings:
            params["lm_head"] = {"kernel": t["lm_head.weight"].T}
        for i in range(c.num_hidden_layers):
            p = f"model.layers.{i}."
            attention, mlp = {}, {}
            for x, n in heads.items():
                name = f"{p}self_attn.{x}_proj."
                attention[x] = {"kernel": t[name + "weight"].T.reshape(-1, n, c.head_dim)}
                if c.attention_bias:
                    attention[x]["bias"] = t[name + "bias"].reshape(n, c.head_dim)
            out = t[f"{p}self_attn.o_proj.weight"].T
            attention["o"] = {"kernel": out.reshape(-1, c.head_dim, c.hidden_size)}
            if c.attention_bias:
                attention["o"]["bias"] = t[f"{p}self_attn.o_proj.bias"]
            for x in ("gate", "up", "down"):
                mlp[x] = {"kernel": t[f"{p}mlp.{x}_proj.weight"].T}
                if c.mlp_bias:
                    mlp[x]["bias"] = t[f"{p}mlp.{x}_proj.bias"]
            params[f"layers_{i}"] = {
                "attention_norm": {"scale": t[f"{p}input_layernorm.weight"]},
                "mlp_norm": {"scale": t[f"{p}post_attention_layernorm.weight"]},
                "attention": attention,
                "mlp": mlp,
            }
        return params

    return convert


@pytest.fixture
def assert_same() -> Callable[[dict, dict], None]:
    """Two parameter trees have the same keys, dtypes and bits."""

    def walk(got, want, path=""):
        if isinstance(want, dict):
            assert got.keys() == want.keys(), path
            for key in want:
                walk(got[key], want[key], f"{path}/{key}")
            return
        got, want = np.asarray(got), np.asarray(want)
        assert got.dtype == want.dtype, path
        np.testing.assert_array_equal(
            got.astype(np.float32), want.astype(np.float32), err_msg=path, strict=True
        )

    return walk
