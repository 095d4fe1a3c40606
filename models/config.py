"""What a Llama checkpoint is: its architecture, read from and written to HF's `config.json`.

Run choices (mesh, dtype of the run, attention plan, memory) live elsewhere. Every field of an HF
config is either understood, known not to change a logit, or refused by name: a setting that is
silently lost (RoPE scaling above all) gives a model that looks right and is wrong.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, get_args

from alaya_jax.errors import ConfigError

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]

# Fields of each RoPE type beyond `rope_type` and `rope_theta`: name -> required.
ROPE_FIELDS: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True, "original_max_position_embeddings": False},
    "dynamic": {"factor": True, "original_max_position_embeddings": False},
    "llama3": {
        "factor": True,
        "low_freq_factor": True,
        "high_freq_factor": True,
        "original_max_position_embeddings": False,
    },
    "yarn": {
        "factor": False,
        "original_max_position_embeddings": False,
        "attention_factor": False,
        "beta_fast": False,
        "beta_slow": False,
        "mscale": False,
        "mscale_all_dim": False,
        "truncate": False,
    },
}

# HF fields that do not change a logit of a causal Llama in inference.
_IGNORED = frozenset(
    [
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)
# HF fields that are fine only at these values.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (None, 1, 1.0),
    "add_cross_attention": (False, None),
    "use_qk_norm": (False, None),
}
_DTYPES = ("float32", "bfloat16", "float16")


def _check_types(config: Any) -> None:
    """Refuses a field whose value is not what its annotation says."""
    kinds = {"int": numbers.Integral, "float": numbers.Real, "bool": bool, "str": str}
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), getattr(f.type, "__name__", str(f.type))
        name, _, optional = str(hint).partition(" | ")
        if (value is None and optional) or name not in kinds:
            continue
        if not isinstance(value, kinds[name]) or (isinstance(value, bool) and name != "bool"):
            raise ConfigError(f"config field {f.name!r} must be {name}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding as the checkpoint was trained.

    Attributes:
      rope_type: which rule turns `theta` into inverse frequencies (see `rope.py`).
      theta: base wavelength.
      factor: by how much the context was stretched.
      original_max_position_embeddings: length before stretching, tokens.
      low_freq_factor, high_freq_factor: llama3 only.
      attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate: yarn only.
    """

    rope_type: RopeType = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _check_types(self)
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool | str | None):
                continue
            if f.name in ("mscale", "mscale_all_dim") and value == 0:  # HF's way to leave them out
                continue
            if not 0 < value < math.inf:
                raise ConfigError(f"RoPE field {f.name!r} must be positive and finite, got {value}")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"RoPE field 'high_freq_factor' = {self.high_freq_factor} must be above "
                f"'low_freq_factor' = {self.low_freq_factor}"
            )
        if self.rope_type == "yarn" and not (self.theta > 1 and self.beta_fast > self.beta_slow):
            raise ConfigError(
                f"YaRN needs theta above 1 and beta_fast above beta_slow, got {self.theta}, "
                f"{self.beta_fast} and {self.beta_slow}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a Llama checkpoint. Field names are HF's.

    Attributes:
      vocab_size: V.
      hidden_size: E.
      intermediate_size: F.
      num_hidden_layers: L.
      num_attention_heads: H.
      num_key_value_heads: K; `group_size` = H / K query heads share a kv head.
      head_dim: D.
      max_position_embeddings: length that the checkpoint declares, tokens; of a stretched RoPE it
        may be the length before stretching (see `max_length`).
      dtype: what the checkpoint stores ("float32", "bfloat16" or "float16").
      max_sequence_length: length after stretching, tokens, where the config says so in a field of
        its own (Vicuna).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    max_sequence_length: int | None = None

    def __post_init__(self):
        _check_types(self)
        if self.max_sequence_length is not None and self.max_sequence_length <= 0:
            raise ConfigError(
                f"config field 'max_sequence_length' must be positive, got "
                f"{self.max_sequence_length}"
            )
        for f in dataclasses.fields(self):
            if f.type is int and getattr(self, f.name) <= 0:
                raise ConfigError(
                    f"config field {f.name!r} must be positive, got {getattr(self, f.name)}"
                )
        if not 0 < self.rms_norm_eps < math.inf:
            raise ConfigError(
                f"config field 'rms_norm_eps' must be positive and finite, got {self.rms_norm_eps}"
            )
        if self.rope.rope_type == "dynamic" and self.head_dim == 2:
            raise ConfigError("dynamic RoPE stretches no head of head_dim = 2")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config field 'num_key_value_heads' = {self.num_key_value_heads} must divide "
                f"'num_attention_heads' = {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"config field 'head_dim' must be even for RoPE, got {self.head_dim}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"config field 'dtype' must be one of {_DTYPES}, got {self.dtype!r}")

    @property
    def group_size(self) -> int:
        """G: query heads that share one kv head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def kv_width(self) -> int:
        """Numbers that the keys and values of one token are, all layers: 2 L K D."""
        return self.num_hidden_layers * self.layer_kv_width

    @property
    def layer_kv_width(self) -> int:
        """Those of one layer: 2 K D."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def max_length(self) -> int:
        """Longest sequence this checkpoint declares, tokens: what is served unless asked otherwise.

        That is `max_position_embeddings`, but where it is the length *before* stretching: always
        with dynamic RoPE; with YaRN where it equals `original_max_position_embeddings`, or that is
        left out (Qwen); with linear scaling where `max_sequence_length` says more (Vicuna), or the
        original length is given and equal. A linear scaling that gives neither does not tell.
        """
        declared, rope = self.max_position_embeddings, self.rope
        if rope.rope_type == "dynamic":
            return int(declared * rope.factor)
        if rope.rope_type in ("linear", "yarn"):
            if self.max_sequence_length is not None:
                return max(declared, self.max_sequence_length)
            if declared == rope.original_max_position_embeddings:
                return max(declared, round(declared * rope.factor))
        return declared

    @property
    def longest(self) -> int:
        """Longest sequence that RoPE is stretched for, tokens: at least `max_length`."""
        original = self.rope.original_max_position_embeddings or self.max_position_embeddings
        if self.rope.rope_type not in ("linear", "yarn", "llama3"):
            return self.max_length
        return max(self.max_length, round(original * self.rope.factor))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the contents of HF's `config.json`.

        Both spellings of RoPE are read: `rope_theta` + `rope_scaling` (Meta's published
        repositories) and `rope_parameters` (transformers 5).

        Raises:
          ConfigError: a required field is missing, or a field is not understood; it is named.
        """
        rest = {k: v for k, v in config.items() if k not in _IGNORED}
        model_type = config.get("model_type", "llama")
        architectures = config.get("architectures") or ["LlamaForCausalLM"]
        if model_type != "llama" or architectures != ["LlamaForCausalLM"]:
            raise ConfigError(
                f"config describes model_type={model_type!r}, architectures={architectures!r}; "
                "only 'llama' / 'LlamaForCausalLM' can be loaded"
            )
        for name, allowed in _REQUIRED_VALUES.items():
            value = rest.pop(name, allowed[0])
            if value not in allowed:
                raise ConfigError(
                    f"config field {name!r} = {value!r} is not supported (understood: "
                    f"{allowed[0]!r})"
                )

        def take(name: str, default: Any = dataclasses.MISSING) -> Any:
            value = rest.pop(name, None)
            if value is not None:
                return value
            if default is dataclasses.MISSING:
                raise ConfigError(f"config field {name!r} is missing")
            return default

        hidden, heads = take("hidden_size"), take("num_attention_heads")
        if not all(isinstance(n, int) and n > 0 for n in (hidden, heads)):
            raise ConfigError(
                f"config fields 'hidden_size' = {hidden!r} and 'num_attention_heads' = {heads!r} "
                "must be positive integers"
            )
        rest.setdefault("dtype", rest.pop("torch_dtype", None))
        eos = take("eos_token_id", ())
        eos = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        if not all(isinstance(id, int) and id >= 0 for id in eos):
            raise ConfigError(f"config field 'eos_token_id' must be ids, got {eos}")
        max_positions = take("max_position_embeddings")
        fields = {
            "vocab_size": take("vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": take("intermediate_size"),
            "num_hidden_layers": take("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": take("num_key_value_heads", heads),
            "head_dim": take("head_dim", hidden // heads),
            "max_position_embeddings": max_positions,
            "rms_norm_eps": take("rms_norm_eps", 1e-6),
            "tie_word_embeddings": take("tie_word_embeddings", False),
            "attention_bias": take("attention_bias", False),
            "mlp_bias": take("mlp_bias", False),
            "bos_token_id": take("bos_token_id", None),
            "eos_token_ids": eos,
            "dtype": str(take("dtype", "float32")).removeprefix("torch."),
            "max_sequence_length": take("max_sequence_length", None),
            "rope": _read_rope(rest, max_positions),
        }
        if rest:
            raise ConfigError(
                f"config has fields that are not understood: {sorted(rest)}. A lost setting gives "
                "wrong logits, so it is refused; remove the field if you know it has no effect on "
                "inference"
            )
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The same architecture as HF's `config.json` (new spelling); `from_hf` reads it back
        equal.
        """
        hf: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        for f in dataclasses.fields(self):
            if f.name not in ("rope", "eos_token_ids"):
                hf[f.name] = getattr(self, f.name)
        if self.max_sequence_length is None:
            del hf["max_sequence_length"]
        hf["hidden_act"] = "silu"
        eos = list(self.eos_token_ids)
        hf["eos_token_id"] = eos[0] if len(eos) == 1 else (eos or None)
        parameters: dict[str, Any] = {
            "rope_type": self.rope.rope_type,
            "rope_theta": self.rope.theta,
        }
        for name in ROPE_FIELDS[self.rope.rope_type]:
            if getattr(self.rope, name) is not None:
                parameters[name] = getattr(self.rope, name)
        hf["rope_parameters"] = parameters
        return hf

    def lengths_apart(self) -> "LlamaConfig":
        """The same with the length after stretching in `max_position_embeddings`, the one before it
        in RoPE's `original_max_position_embeddings`.
        """
        longest, rope = self.max_sequence_length, self.rope
        if longest is None:
            return self
        config = dataclasses.replace(self, max_sequence_length=None)
        if rope.rope_type not in ("linear", "yarn") or longest <= self.max_position_embeddings:
            return config
        original = rope.original_max_position_embeddings or self.max_position_embeddings
        rope = dataclasses.replace(rope, original_max_position_embeddings=original)
        return dataclasses.replace(config, max_position_embeddings=longest, rope=rope)

    def in_digest(self) -> dict[str, Any]:
        """What a fingerprint is made of: `to_hf`, but for lengths that change no number."""
        hf = self.to_hf()
        hf.pop("max_sequence_length", None)
        if self.rope.rope_type == "linear":
            hf["rope_parameters"].pop("original_max_position_embeddings", None)
        return hf


def _read_rope(rest: dict[str, Any], max_positions: int) -> RopeConfig:
    """Pops both spellings of RoPE from `rest`."""
    theta = rest.pop("rope_theta", None)
    old, new = rest.pop("rope_scaling", None), rest.pop("rope_parameters", None)
    where = "rope_parameters" if new else "rope_scaling"
    if old and new and old != new:
        raise ConfigError("config has both 'rope_scaling' and 'rope_parameters', and they differ")
    given = dict(new or old or {})
    apart = rest.pop("original_max_position_embeddings", None)  # beside it, as Phi-3 has it
    if apart is not None and apart != given.setdefault("original_max_position_embeddings", apart):
        raise ConfigError(
            f"config field 'original_max_position_embeddings' = {apart!r} and that of {where!r} = "
            f"{given['original_max_position_embeddings']!r} differ"
        )
    if "type" in given:  # spelling of early checkpoints
        legacy = given.pop("type")
        given.setdefault("rope_type", legacy)
    rope_type = given.pop("rope_type", "default")
    if rope_type not in get_args(RopeType):
        raise ConfigError(
            f"config field '{where}.rope_type' = {rope_type!r} is not understood; "
            f"understood: {', '.join(get_args(RopeType))}"
        )
    inner_theta = given.pop("rope_theta", None)
    theta = inner_theta if inner_theta is not None else theta
    if given.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        raise ConfigError(
            f"config field '{where}.partial_rotary_factor' other than 1 is not supported"
        )
    known = ROPE_FIELDS[rope_type]
    unknown = sorted(set(given) - set(known))
    # transformers writes `original_max_position_embeddings` for every type; only some read it.
    unknown = [name for name in unknown if name != "original_max_position_embeddings"]
    if unknown:
        raise ConfigError(
            f"config field '{where}' of type {rope_type!r} has unknown keys {unknown}"
        )
    missing = [name for name, needed in known.items() if needed and given.get(name) is None]
    if missing:
        raise ConfigError(f"config field '{where}' of type {rope_type!r} lacks {missing}")
    values = {name: value for name, value in given.items() if value is not None and name in known}
    if "original_max_position_embeddings" in known and rope_type != "linear":
        values.setdefault("original_max_position_embeddings", max_positions)
    if rope_type == "yarn" and "factor" not in values:
        values["factor"] = max_positions / values["original_max_position_embeddings"]
    return RopeConfig(
        rope_type=rope_type, theta=float(theta if theta is not None else 10_000.0), **values
    )
