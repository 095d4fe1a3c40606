"""The config of a GGUF file of architecture 'llama', from its metadata."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from alaya_jax.checkpoint.source import StoredTensor
from alaya_jax.errors import ConfigError
from alaya_jax.models.config import LlamaConfig

ROPE_FREQS = "rope_freqs.weight"
"""Tensor that holds llama3 RoPE scaling: a divisor for each frequency."""

# Keys below `llama.` -> (HF field, default; None: required).
_FIELDS: dict[str, tuple[str, Any]] = {
    "block_count": ("num_hidden_layers", None),
    "embedding_length": ("hidden_size", None),
    "feed_forward_length": ("intermediate_size", None),
    "attention.head_count": ("num_attention_heads", None),
    "context_length": ("max_position_embeddings", None),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", None),
    "rope.freq_base": ("rope_theta", 10_000.0),
}
# Keys that are fine only at these values.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "logit_scale": (1.0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth",),
}
# Keys that say how the file came to be, not what the model computes.
_IGNORED = frozenset({"rope.scaling.finetuned"})


def read_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor], dtype: np.dtype
) -> LlamaConfig:
    """LlamaConfig from GGUF metadata, by way of the HF fields."""
    keys = {
        key.removeprefix("llama."): _shortest(value)
        for key, value in metadata.items()
        if key.startswith("llama.") and key.removeprefix("llama.") not in _IGNORED
    }
    hf: dict[str, Any] = {"model_type": "llama", "dtype": dtype.name}
    for key, (field, default) in _FIELDS.items():
        hf[field] = keys.pop(key, default)
        if not isinstance(hf[field], (int, float, list)):
            raise ConfigError(f"metadata key 'llama.{key}' is missing or no number: {hf[field]!r}")
    for key, allowed in _REQUIRED_VALUES.items():
        if (value := keys.pop(key, allowed[0])) not in allowed:
            raise ConfigError(
                f"metadata key 'llama.{key}' = {value!r} is not supported "
                f"(understood: {allowed[0]!r})"
            )
    hf["num_key_value_heads"] = keys.pop("attention.head_count_kv", hf["num_attention_heads"])
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if isinstance(hf[field], list):
            if len(set(hf[field])) != 1:
                raise ConfigError(
                    f"metadata gives each layer its own {field!r}, which is not supported"
                )
            hf[field] = hf[field][0]
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads <= 0:
        raise ConfigError(f"metadata gives {heads!r} attention heads and hidden size {hidden!r}")
    dims = {
        keys.pop(key, None)
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    } - {None}
    if len(dims) > 1:
        raise ConfigError(
            f"metadata gives key, value and RoPE dimensions that differ ({sorted(dims)}), "
            "which is not supported"
        )
    hf["head_dim"] = dims.pop() if dims else hidden // heads
    embedding = tensors.get("token_embd.weight")
    vocab = keys.pop("vocab_size", embedding.shape[0] if embedding else None)
    if vocab is None:
        raise ConfigError(
            "metadata key 'llama.vocab_size' and tensor 'token_embd.weight' are missing"
        )
    hf["vocab_size"] = vocab
    hf["tie_word_embeddings"] = "output.weight" not in tensors
    hf["attention_bias"] = "blk.0.attn_q.bias" in tensors
    hf["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    hf["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    ends = (metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom"))
    hf["eos_token_id"] = list(dict.fromkeys(end for end in ends if end is not None))
    hf["rope_parameters"] = _read_rope(keys, hf, tensors.get(ROPE_FREQS))
    if keys:
        raise ConfigError(
            f"metadata has keys that are not understood: {sorted('llama.' + key for key in keys)}. "
            "A lost setting gives wrong logits, so it is refused"
        )
    return LlamaConfig.from_hf(hf)


def _shortest(value: Any) -> Any:
    """Undoes storing a number in float32, after which 1e-5 reads 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_rope(
    keys: dict[str, Any], hf: dict[str, Any], freqs: StoredTensor | None
) -> dict[str, Any]:
    """HF's rope_parameters; pops what it reads from `keys`, and `rope_theta` from `hf`."""
    theta = hf.pop("rope_theta")
    scale = keys.pop("rope.scale_linear", 1.0)  # spelling of early files
    kind = keys.pop("rope.scaling.type", "none" if scale == 1.0 else "linear")
    factor = keys.pop("rope.scaling.factor", scale)
    original = keys.pop("rope.scaling.original_context_length", None)
    given = [keys.pop(f"rope.scaling.{key}", None) for key in ("attn_factor", "yarn_attn_factor")]
    attention = next((factor for factor in given if factor is not None), None)
    if any(factor not in (None, attention) for factor in given):
        raise ConfigError(
            f"metadata keys 'llama.rope.scaling.attn_factor' = {given[0]!r} and "
            f"'.yarn_attn_factor' = {given[1]!r} differ, and programs disagree on which counts"
        )
    beta = {
        name: keys.pop(f"rope.scaling.yarn_{name}", None) for name in ("beta_fast", "beta_slow")
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if freqs is not None:
        if kind != "none":
            raise ConfigError(f"{ROPE_FREQS} and RoPE scaling {kind!r} are both given")
        return rope | _llama3_from_freqs(freqs, theta, hf["head_dim"], original)
    if kind == "none":
        return rope
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
        return rope if original is None else rope | {"original_max_position_embeddings": original}
    if kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
        rope |= beta
        if attention not in (None, 1.0) or factor < 1:  # below 1 HF leaves them as they are
            rope["attention_factor"] = _shortest((attention or 1.0) * yarn_magnitude(factor))
        return rope
    raise ConfigError(
        f"metadata key 'llama.rope.scaling.type' = {kind!r} is not supported "
        "(understood: 'none', 'linear', 'yarn', and llama3 by its frequencies)"
    )


def yarn_magnitude(factor: float) -> float:
    """YaRN's own factor on cos and sin; GGUF's attn_factor multiplies it."""
    return 0.1 * math.log(factor) + 1.0


def llama3_divisors(
    theta: float, head_dim: int, factor: float, low: float, high: float, length: int
) -> np.ndarray:
    """What llama3 RoPE scaling divides each frequency by, float64 [D/2].

    Args:
      theta: base wavelength.
      head_dim: D.
      factor, low, high: the scaling's factor, low_freq_factor and high_freq_factor.
      length: original length, tokens.
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((length / wavelength - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _llama3_from_freqs(
    tensor: StoredTensor, theta: float, head_dim: int, original: int | None
) -> dict[str, Any]:
    """Finds the llama3 RoPE parameters that a table of frequency divisors was computed from.

    GGUF keeps only the table, float32 [D/2]. Every published Llama has low_freq_factor 1,
    high_freq_factor 4 and original length 8192; the largest divisor is the factor. What they give
    is compared with the table, so another table is refused instead of being read almost right.
    """
    table = tensor.read().astype(np.float64)
    if table.shape != (head_dim // 2,):
        raise ConfigError(f"{ROPE_FREQS} has shape {list(table.shape)}, not [{head_dim // 2}]")
    low, high, length = 1.0, 4.0, original or 8192
    factor = float(table.max())
    expected = llama3_divisors(theta, head_dim, factor, low, high, length)
    if not np.allclose(table, expected, rtol=3e-5, atol=0.0):
        raise ConfigError(
            f"{ROPE_FREQS} is no llama3 scaling of factor {factor:g}, low_freq_factor {low:g}, "
            f"high_freq_factor {high:g}, original length {length}; load the HF checkpoint, whose "
            "config.json states its parameters"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
