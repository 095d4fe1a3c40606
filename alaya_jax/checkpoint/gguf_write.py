"""Writes GGUF files of architecture 'llama': metadata, tokenizer, tensors one at a time.

What GGUF cannot say (a RoPE of type 'dynamic', YaRN's betas, a low_freq_factor other than 1, ...)
is found out before anything is written: the metadata are read back by our own reader and compared.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
from gguf import GGMLQuantizationType as QuantType
from gguf import GGUFValueType as Kind

from alaya_jax.checkpoint.gguf_config import (
    ROPE_FREQS,
    llama3_divisors,
    read_config,
    yarn_magnitude,
)
from alaya_jax.checkpoint.gguf_tokenizer import tokenizer_metadata
from alaya_jax.checkpoint.identity import Digest
from alaya_jax.checkpoint.source import Source, StoredTensor
from alaya_jax.checkpoint.weights import KINDS, Weight, cast, count_nonfinite
from alaya_jax.errors import ConfigError
from alaya_jax.models.config import LlamaConfig

GGUFTarget = Literal["gguf-f16", "gguf-bf16", "gguf-f32"]
FILE = "model.gguf"
"""Its name while it is unfinished."""
_DTYPES = {"gguf-f16": "float16", "gguf-bf16": "bfloat16", "gguf-f32": "float32"}
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # gguf.LlamaFileType
_RAW = {"F32": QuantType.F32, "F16": QuantType.F16, "BF16": QuantType.BF16}

Metadata = dict[str, Any]


def is_gguf(to: str) -> bool:
    """Whether a target is a GGUF file."""
    return to in get_args(GGUFTarget)


def matrix_dtype(to: str) -> str:
    """Name of the type that a GGUF target keeps matrices in; norms and biases stay float32."""
    return _DTYPES[to]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a GGUF file says of a model beside its weights.

    Attributes:
      config: as it will be read from the file; only the order of its end ids, and ids that the
        tokenizer adds, may differ from what was asked for.
      metadata: by key.
      divisors: float32 [D/2] of llama3 RoPE scaling, or None.
    """

    config: LlamaConfig
    metadata: Metadata
    divisors: np.ndarray | None


def describe(source: Source, config: LlamaConfig, pre: str | None) -> Description:
    """Everything to write about a model.

    Args:
      source: where name and tokenizer come from.
      config: with the type of the matrices.
      pre: see `tokenizer_metadata`.

    Raises:
      ConfigError: GGUF cannot say it, or how the tokenizer cuts text is not known.
    """
    config = config.lengths_apart()  # GGUF has no third one
    metadata, divisors = _architecture(config)
    metadata["general.name"] = source.path.stem
    metadata |= tokenizer_metadata(source, config, pre)
    return Description(_read_back(config, metadata, divisors), metadata, divisors)


def _architecture(config: LlamaConfig) -> tuple[Metadata, np.ndarray | None]:
    rope = config.rope
    keys: Metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(rope.theta),
        "vocab_size": config.vocab_size,
    }
    divisors = None
    original = rope.original_max_position_embeddings
    if rope.rope_type in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope.rope_type
        keys["rope.scaling.factor"] = float(rope.factor)
    if rope.rope_type in ("llama3", "yarn", "linear") and original is not None:
        keys["rope.scaling.original_context_length"] = original
    if rope.rope_type == "llama3":
        divisors = llama3_divisors(
            rope.theta,
            config.head_dim,
            rope.factor,
            rope.low_freq_factor,
            rope.high_freq_factor,
            original or 0,
        ).astype(np.float32)
    # llama.cpp reads no betas of a 'llama': others than its own are refused when this is read back.
    if rope.rope_type == "yarn" and (rope.attention_factor is not None or rope.factor < 1):
        keys["rope.scaling.attn_factor"] = _magnitude(config) / yarn_magnitude(rope.factor)
    metadata = {f"llama.{key}": value for key, value in keys.items()}
    metadata |= {"general.architecture": "llama"}
    metadata |= {"general.file_type": _FILE_TYPES[config.dtype]}
    metadata |= {"general.quantization_version": gguf.GGML_QUANT_VERSION}
    return metadata, divisors


def _read_back(config: LlamaConfig, metadata: Metadata, divisors: np.ndarray | None) -> LlamaConfig:
    stub = {"blk.0.attn_q.bias": config.attention_bias, "blk.0.ffn_gate.bias": config.mlp_bias}
    stub["output.weight"] = not config.tie_word_embeddings
    tensors: dict[str, Any] = {name: None for name, there in stub.items() if there}
    if divisors is not None:
        tensors[ROPE_FREQS] = StoredTensor(
            ROPE_FREQS, divisors.shape, "F32", divisors.dtype, Path(), None, lambda _: divisors
        )
    try:
        found = read_config(metadata, tensors, np.dtype(config.dtype))
    except ConfigError as error:
        raise ConfigError(f"GGUF cannot say this config: {error}; write --to hf") from error
    read = found
    if math.isclose(_magnitude(config), _magnitude(found), rel_tol=1e-6):  # it is a product there
        factor = config.rope.attention_factor
        rope = dataclasses.replace(found.rope, attention_factor=factor)
        read = dataclasses.replace(found, rope=rope)
    lost = {
        f.name: (getattr(config, f.name), getattr(read, f.name))
        for f in dataclasses.fields(LlamaConfig)
        if getattr(config, f.name) != getattr(read, f.name)
        and f.name not in ("bos_token_id", "eos_token_ids")
    }
    if lost:
        fields = "; ".join(f"{name} = {a} would read {b}" for name, (a, b) in lost.items())
        raise ConfigError(f"GGUF cannot say this config: {fields}; write --to hf")
    return found


def _magnitude(config: LlamaConfig) -> float:
    """YaRN's factor on cos and sin, without mscale."""
    own = config.rope.attention_factor
    return yarn_magnitude(max(config.rope.factor, 1.0)) if own is None else own


def write_weights(
    directory: Path,
    description: Description,
    weights: list[Weight],
    wrote: Callable[[Weight, Digest, int], None],
) -> None:
    """Writes the file; one that is there, from a run that was cut off, is written anew.

    Args:
      directory: an existing directory.
      description: all but the weights.
      weights: every parameter of the model, with the type to write.
      wrote: called for each weight with its digest and the number of its values that are not
        finite.
    """
    divisors = description.divisors
    writer = gguf.GGUFWriter(directory / FILE, "llama")
    for key, value in description.metadata.items():
        if key != "general.architecture":  # which the writer has written
            writer.add_key_value(key, value, *_kind(key, value))
    if divisors is not None:
        writer.add_tensor_info(ROPE_FREQS, divisors.shape, divisors.dtype, divisors.nbytes)
    for weight in weights:
        raw = _RAW[KINDS[weight.dtype]]
        shape = weight.entry.shape_in("gguf")
        writer.add_tensor_info(
            weight.entry.gguf, shape, np.dtype(np.float32), weight.nbytes, raw_dtype=raw
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for weight in weights:
            view = weight.layout("gguf")
            digest, values = weight.digest(view, "gguf"), cast(view, weight.dtype)
            writer.write_tensor_data(values.reshape(-1).view(np.uint8))
            wrote(weight, digest, count_nonfinite(values))
            del view, values
            weight.tensor.release()
    finally:
        writer.close()


def _kind(key: str, value: Any) -> tuple[Kind, Kind | None]:
    """GGUF's type of a value; for a list, also that of its items."""
    if isinstance(value, (list, tuple)):
        kinds = {_kind(key, item)[0] for item in value} or {Kind.STRING}
        if kinds == {Kind.UINT32} and key.endswith("token_type"):
            kinds = {Kind.INT32}
        if len(kinds) > 1:
            kinds = {Kind.FLOAT32 if Kind.FLOAT32 in kinds else Kind.INT32}
        return Kind.ARRAY, kinds.pop()
    if isinstance(value, bool):
        return Kind.BOOL, None
    if isinstance(value, str):
        return Kind.STRING, None
    if isinstance(value, float):
        return Kind.FLOAT32, None
    return (Kind.UINT32 if value >= 0 else Kind.INT32), None
