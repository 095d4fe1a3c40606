"""Where each parameter stands in each checkpoint format: one table, read in both directions.

A row says what a tensor is called in the parameter pytree, in HF, in GGUF and by Meta, and how its
dimensions are laid out in the file and in memory, by axis letter (E model dim, H query heads, K kv
heads, D head_dim, F ffn dim, V vocab). Letters written together are fused into one dimension of the
stored tensor: `"HD E" -> "E H D"` is a stored matrix [H*D, E] that becomes a kernel [E, H, D]. Both
directions are a reshape and a transposition derived from those two strings, so nothing is said
twice. What they cannot say is that GGUF and Meta order the rows of q and k differently from HF; see
`rope_to_gguf`. Orbax stores the pytree as it is.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from alaya_jax.models.config import LlamaConfig

Format = Literal["hf", "gguf", "meta", "orbax"]

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

_A, _M = "attention_bias", "mlp_bias"
# (params path, then the name in HF, GGUF and Meta files less ".weight", stored axes, params axes)
_MODEL = (
    ("embed/embedding", "model.embed_tokens", "token_embd", "tok_embeddings", "V E", "V E"),
    ("norm/scale", "model.norm", "output_norm", "norm", "E", "E"),
    ("lm_head/kernel", "lm_head", "output", "output", "V E", "E V"),  # only when untied
)
# The same below layers_{i}/, model.layers.{i}., blk.{i}. and layers.{i}.; and the config field that
# adds a bias [first stored dimension], where there may be one.
_LAYER = (
    ("attention_norm/scale", "input_layernorm", "attn_norm", "attention_norm", "E", "E", ""),
    ("attention/q/kernel", "self_attn.q_proj", "attn_q", "attention.wq", "HD E", "E H D", _A),
    ("attention/k/kernel", "self_attn.k_proj", "attn_k", "attention.wk", "KD E", "E K D", _A),
    ("attention/v/kernel", "self_attn.v_proj", "attn_v", "attention.wv", "KD E", "E K D", _A),
    ("attention/o/kernel", "self_attn.o_proj", "attn_output", "attention.wo", "E HD", "H D E", _A),
    ("mlp_norm/scale", "post_attention_layernorm", "ffn_norm", "ffn_norm", "E", "E", ""),
    ("mlp/gate/kernel", "mlp.gate_proj", "ffn_gate", "feed_forward.w1", "F E", "E F", _M),
    ("mlp/up/kernel", "mlp.up_proj", "ffn_up", "feed_forward.w3", "F E", "E F", _M),
    ("mlp/down/kernel", "mlp.down_proj", "ffn_down", "feed_forward.w2", "E F", "F E", _M),
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of one model: its names, its layouts and its sizes.

    Attributes:
      path: keys in the parameter pytree.
      hf: tensor name in an HF checkpoint.
      gguf: tensor name in a GGUF file.
      meta: tensor name in Meta's files.
      stored_axes: one string of axis letters per dimension of the stored tensor.
      axes: one axis letter per dimension of the parameter.
      sizes: size of each axis letter.
    """

    path: tuple[str, ...]
    hf: str
    gguf: str
    meta: str
    stored_axes: tuple[str, ...]
    axes: tuple[str, ...]
    sizes: dict[str, int]

    def name(self, fmt: Format) -> str:
        """Tensor name in the given format."""
        return "/".join(self.path) if fmt == "orbax" else getattr(self, fmt)

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
        """Shape of the tensor in files (GGUF lists dimensions in reverse)."""
        return tuple(math.prod(self.sizes[a] for a in fused) for fused in self.stored_axes)

    def shape_in(self, fmt: Format) -> tuple[int, ...]:
        """Shape of the tensor in the given format."""
        return self.shape if fmt == "orbax" else self.stored_shape

    def to_params(self, stored: np.ndarray, fmt: Format) -> np.ndarray:
        """Stored layout -> parameter layout; a view of `stored` where rows keep their order."""
        if fmt == "orbax":
            return stored
        if heads := self._permuted_heads(fmt):
            stored = rope_from_gguf(stored, heads)
        letters = "".join(self.stored_axes)
        split = stored.reshape([self.sizes[a] for a in letters])
        return split.transpose([letters.index(a) for a in self.axes])

    def to_stored(self, param: np.ndarray, fmt: Format) -> np.ndarray:
        """Parameter layout -> stored layout; inverse of `to_params`."""
        if fmt == "orbax":
            return param
        letters = "".join(self.stored_axes)
        stored = param.transpose([self.axes.index(a) for a in letters]).reshape(self.stored_shape)
        heads = self._permuted_heads(fmt)
        return rope_to_gguf(stored, heads) if heads else stored

    def _permuted_heads(self, fmt: Format) -> int | None:
        """Number of heads whose rows the format permutes for RoPE; None where it does not."""
        permuted = fmt in ("gguf", "meta") and len(self.path) > 2 and self.path[-2] in ("q", "k")
        return self.sizes[self.stored_axes[0][0]] if permuted else None


def entries(config: LlamaConfig) -> list[Entry]:
    """Every parameter a checkpoint of this config holds, in the order of the model."""
    sizes = {letter: getattr(config, field) for letter, field in AXIS_FIELDS.items()}
    return [
        Entry(
            tuple(path.split("/")),
            hf,
            gguf,
            meta,
            tuple(stored.split()),
            tuple(axes.split()),
            sizes,
        )
        for path, hf, gguf, meta, stored, axes in _rows(config)
    ]


def _rows(config: LlamaConfig) -> Iterator[tuple[str, ...]]:
    embed, norm, head = _MODEL
    yield _named(embed, "weight")
    for i in range(config.num_hidden_layers):
        starts = f"layers_{i}/", f"model.layers.{i}.", f"blk.{i}.", f"layers.{i}.", "", ""
        for *row, bias in _LAYER:
            row = tuple(start + part for start, part in zip(starts, row, strict=True))
            yield _named(row, "weight")
            if bias and getattr(config, bias):
                path, *names, stored, _ = row
                fused = stored.split()[0]
                path = path.replace("/kernel", "/bias")
                yield _named((path, *names, fused, " ".join(fused)), "bias")
    yield _named(norm, "weight")
    if not config.tie_word_embeddings:
        yield _named(head, "weight")


def _named(row: tuple[str, ...], suffix: str) -> tuple[str, ...]:
    path, *names, stored, axes = row
    return path, *(f"{name}.{suffix}" for name in names), stored, axes


def rope_to_gguf(stored: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a stored q or k tensor from HF's RoPE layout to GGUF's and Meta's.

    HF rotates the pair (d, d + D/2) of a head; GGUF's 'llama' and Meta's code rotate the pair
    (2d, 2d + 1), so their files interleave the two halves of each head.

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
