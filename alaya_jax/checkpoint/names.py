"""Where each parameter stands in each checkpoint format: one table, read in both directions.

A row says what a tensor is called in the parameter pytree, in HF and in GGUF, and how its
dimensions are laid out in the file and in memory, by axis letter (E model dim, H query heads, K kv
heads, D head_dim, F ffn dim, V vocab). Letters written together are fused into one dimension of the
stored tensor: `"HD E" -> "E H D"` is a stored matrix [H*D, E] that becomes a kernel [E, H, D]. Both
directions are a reshape and a transposition derived from those two strings, so nothing is said
twice. What they cannot say is that GGUF permutes the rows of q and k; see `rope_to_gguf`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from alaya_jax.models.config import LlamaConfig

Format = Literal["hf", "gguf"]

# Axis letter -> the config field that gives its size, and its name in sharding rules.
AXIS_FIELDS = {
    "V": "vocab_size",
    "E": "hidden_size",
    "F": "intermediate_size",
    "H": "num_attention_heads",
    "K": "num_key_value_heads",
    "D": "head_dim",
}
_LOGICAL = {"V": "vocab", "E": "embed", "F": "ffn", "H": "heads", "K": "kv_heads", "D": "head_dim"}

# (params path, HF name, GGUF name, stored axes, params axes, config condition)
_MODEL = (
    ("embed/embedding", "model.embed_tokens.weight", "token_embd.weight", "V E", "V E", ""),
    ("norm/scale", "model.norm.weight", "output_norm.weight", "E", "E", ""),
    ("lm_head/kernel", "lm_head.weight", "output.weight", "V E", "E V", "untied"),
)
# The same below layers_{i}/, model.layers.{i}. and blk.{i}.
_LAYER = (
    ("attention_norm/scale", "input_layernorm.weight", "attn_norm.weight", "E", "E", ""),
    ("attention/q/kernel", "self_attn.q_proj.weight", "attn_q.weight", "HD E", "E H D", ""),
    ("attention/q/bias", "self_attn.q_proj.bias", "attn_q.bias", "HD", "H D", "attention_bias"),
    ("attention/k/kernel", "self_attn.k_proj.weight", "attn_k.weight", "KD E", "E K D", ""),
    ("attention/k/bias", "self_attn.k_proj.bias", "attn_k.bias", "KD", "K D", "attention_bias"),
    ("attention/v/kernel", "self_attn.v_proj.weight", "attn_v.weight", "KD E", "E K D", ""),
    ("attention/v/bias", "self_attn.v_proj.bias", "attn_v.bias", "KD", "K D", "attention_bias"),
    ("attention/o/kernel", "self_attn.o_proj.weight", "attn_output.weight", "E HD", "H D E", ""),
    ("attention/o/bias", "self_attn.o_proj.bias", "attn_output.bias", "E", "E", "attention_bias"),
    ("mlp_norm/scale", "post_attention_layernorm.weight", "ffn_norm.weight", "E", "E", ""),
    ("mlp/gate/kernel", "mlp.gate_proj.weight", "ffn_gate.weight", "F E", "E F", ""),
    ("mlp/gate/bias", "mlp.gate_proj.bias", "ffn_gate.bias", "F", "F", "mlp_bias"),
    ("mlp/up/kernel", "mlp.up_proj.weight", "ffn_up.weight", "F E", "E F", ""),
    ("mlp/up/bias", "mlp.up_proj.bias", "ffn_up.bias", "F", "F", "mlp_bias"),
    ("mlp/down/kernel", "mlp.down_proj.weight", "ffn_down.weight", "E F", "F E", ""),
    ("mlp/down/bias", "mlp.down_proj.bias", "ffn_down.bias", "E", "E", "mlp_bias"),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of one model: its names, its layouts and its sizes.

    Attributes:
      path: keys in the parameter pytree.
      hf: tensor name in an HF checkpoint.
      gguf: tensor name in a GGUF file.
      stored_axes: one string of axis letters per dimension of the stored tensor.
      axes: one axis letter per dimension of the parameter.
      sizes: size of each axis letter.
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    stored_axes: tuple[str, ...]
    axes: tuple[str, ...]
    sizes: dict[str, int]

    def name(self, fmt: Format) -> str:
        """Tensor name in the given format."""
        return self.hf if fmt == "hf" else self.gguf

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.sizes[a] for a in self.axes)

    @property
    def logical_axes(self) -> tuple[str, ...]:
        """Logical axis names, as `alaya_jax.sharding.ShardingRules` maps them to a mesh."""
        if self.path[-1] == "scale":
            return ("norm",)
        return tuple(_LOGICAL[a] for a in self.axes)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in HF and GGUF files (GGUF lists dimensions in reverse)."""
        return tuple(math.prod(self.sizes[a] for a in fused) for fused in self.stored_axes)

    def to_params(self, stored: np.ndarray, fmt: Format) -> np.ndarray:
        """Stored layout -> parameter layout; a view of `stored` where rows keep their order."""
        if heads := self._permuted_heads(fmt):
            stored = rope_from_gguf(stored, heads)
        letters = "".join(self.stored_axes)
        split = stored.reshape([self.sizes[a] for a in letters])
        return split.transpose([letters.index(a) for a in self.axes])

    def to_stored(self, param: np.ndarray, fmt: Format) -> np.ndarray:
        """Parameter layout -> stored layout; inverse of `to_params`."""
        letters = "".join(self.stored_axes)
        stored = param.transpose([self.axes.index(a) for a in letters]).reshape(self.stored_shape)
        heads = self._permuted_heads(fmt)
        return rope_to_gguf(stored, heads) if heads else stored

    def _permuted_heads(self, fmt: Format) -> int | None:
        """Number of heads whose rows the format permutes for RoPE; None where it does not."""
        permuted = fmt == "gguf" and len(self.path) > 2 and self.path[-2] in ("q", "k")
        return self.sizes[self.stored_axes[0][0]] if permuted else None


def entries(config: LlamaConfig) -> list[Entry]:
    """Every parameter a checkpoint of this config holds, in the order of the model."""
    sizes = {letter: getattr(config, field) for letter, field in AXIS_FIELDS.items()}
    present = {
        "": True,
        "untied": not config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
    return [
        Entry(tuple(path.split("/")), hf, gguf, tuple(stored.split()), tuple(axes.split()), sizes)
        for path, hf, gguf, stored, axes, condition in _rows(config.num_hidden_layers)
        if present[condition]
    ]


def _rows(num_layers: int) -> Iterator[tuple[str, str, str, str, str, str]]:
    embed, *last = _MODEL
    yield embed
    for i in range(num_layers):
        for path, hf, gguf, stored, axes, condition in _LAYER:
            names = f"layers_{i}/{path}", f"model.layers.{i}.{hf}", f"blk.{i}.{gguf}"
            yield *names, stored, axes, condition
    yield from last


def rope_to_gguf(stored: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a stored q or k tensor from HF's RoPE layout to GGUF's.

    HF rotates the pair (d, d + D/2) of a head; GGUF's 'llama' rotates the pair (2d, 2d + 1), so its
    files interleave the two halves of each head.

    Args:
      stored: [heads * D, ...] weight or bias.
      heads: H for q, K for k.
    """
    split = stored.reshape(heads, 2, stored.shape[0] // heads // 2, *stored.shape[1:])
    return split.swapaxes(1, 2).reshape(stored.shape)


def rope_from_gguf(stored: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of `rope_to_gguf`."""
    split = stored.reshape(heads, stored.shape[0] // heads // 2, 2, *stored.shape[1:])
    return split.swapaxes(1, 2).reshape(stored.shape)
