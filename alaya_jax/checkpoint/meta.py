"""Meta's own checkpoints: `params.json` and `consolidated.*.pth`, split for tensor parallelism."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.checkpoint.hf import has_tokenizer
from alaya_jax.checkpoint.names import Entry, entries
from alaya_jax.checkpoint.source import Piece, Source, StoredTensor, refuse, release
from alaya_jax.checkpoint.torch_file import TorchTensor, read_torch_file
from alaya_jax.checkpoint.weights import KINDS
from alaya_jax.errors import CheckpointError, ConfigError
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.tokenizer import Tokenizer

PARAMS = "params.json"
_HEAD, _EMBEDDING = "output.weight", "tok_embeddings.weight"
_HARMLESS = "rope.freqs"  # a table that early files carry
# params.json does not say by how much `use_scaled_rope` scales; Meta's code knows it by the model:
# Llama 3.2 (1B, 3B) by 32, Llama 3.1 and 3.3 (8B, 70B, 405B) by 8.
_SCALE_OF_DIM = {2048: 32.0, 3072: 32.0, 4096: 8.0, 8192: 8.0, 16_384: 8.0}
_IGNORED = frozenset({"max_batch_size", "max_seq_len", "model_parallel_size"})


def is_meta(path: Path) -> bool:
    """Whether a directory holds a checkpoint in Meta's layout."""
    return (path / PARAMS).exists() and not (path / "config.json").exists()


def open_meta(path: Path) -> Source:
    """Opens a directory of Meta's; reads the names and places of tensors, no weights.

    Raises:
      CheckpointError: files are missing, damaged, or hold anything but tensors.
      ConfigError: params.json describes a model that is not understood.
      TokenizerError: its tokenizer is damaged.
    """
    files = sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise CheckpointError(
            f"{path} has {PARAMS} but no consolidated.*.pth; copy the weights there"
        )
    numbers = [file.name.split(".")[1] for file in files]
    if numbers != [f"{i:02}" for i in range(len(files))]:
        raise CheckpointError(
            f"{path} holds the parts {', '.join(numbers)} of a model; every part from 00 on is "
            "needed: copy the missing ones"
        )
    parts = [read_torch_file(file) for file in files]
    for part in parts:
        part.pop(_HARMLESS, None)
    tokenizer = Tokenizer.from_directory(path) if has_tokenizer(path) else None
    tied = _HEAD not in parts[0] or all(_is_tied(part) for part in parts)
    if tied:
        for part in parts:
            part.pop(_HEAD, None)
    config = _read_config(path / PARAMS, parts, tokenizer, tied)
    expected = {}
    if config.num_hidden_layers <= len(parts[0]):  # before a list of so many layers is made
        expected = {entry.meta: entry for entry in entries(config)}
    problems: list[str] = []
    tensors = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        missing = [f.name for f, part in zip(files, parts, strict=True) if name not in part]
        if missing:
            problems.append(f"tensor {name!r} is missing in {', '.join(missing)}")
            continue
        pieces = [part[name] for part in parts]
        if len({(piece.shape, piece.kind) for piece in pieces}) > 1:
            found = ", ".join(f"{piece.kind}{list(piece.shape)}" for piece in pieces)
            problems.append(f"the parts of tensor {name!r} differ in shape or type: {found}")
            continue
        tensors[name] = _join(name, pieces, files[0], expected.get(name))
    refuse(path, problems)
    return Source(
        format="meta",
        path=path,
        config=config,
        tensors=tensors,
        read_tokenizer=lambda: tokenizer,
        pieces=tuple(_pieces(files, parts)),
    )


def _is_tied(part: dict[str, TorchTensor]) -> bool:
    head, embedding = part[_HEAD], part.get(_EMBEDDING)
    if embedding is None or (head.shape, head.kind) != (embedding.shape, embedding.kind):
        return False
    step = 1 << 24
    starts = range(0, min(head.data.size, embedding.data.size), step)
    return head.strides == embedding.strides and all(
        np.array_equal(head.data[i : i + step], embedding.data[i : i + step]) for i in starts
    )


def _join(name: str, parts: list[TorchTensor], file: Path, entry: Entry | None) -> StoredTensor:
    """One tensor of its parts, which divide one dimension, or are copies of the whole."""
    first = parts[0]
    shape, axis = first.shape, None
    if entry is not None and shape != entry.stored_shape:
        for i, size in enumerate(shape):
            whole = (*shape[:i], size * len(parts), *shape[i + 1 :])
            if whole == entry.stored_shape:
                shape, axis = whole, i

    def read(tensor: StoredTensor) -> np.ndarray:
        if axis is not None:
            values = np.concatenate([part.values() for part in parts], axis)
        else:
            values = first.values()
            for i, part in enumerate(parts):
                if not np.array_equal(part.values().view(np.uint8), values.view(np.uint8)):
                    raise CheckpointError(
                        f"tensor {name!r} should be the same in all parts, and differs in part "
                        f"{i:02} of {file.parent}; download or copy the files again"
                    )
        if len(parts) > 1:
            for part in parts:
                release(part.data)
        return values

    data = None
    if axis is None and first.dtype is not None:
        data = first.data[: math.prod(shape) * first.dtype.itemsize]
    return StoredTensor(
        name=name,
        shape=shape,
        stored_dtype=KINDS[first.dtype] if first.dtype is not None else first.kind,
        dtype=first.dtype,
        file=file,
        data=data,
        decode=read,
    )


def _pieces(files: list[Path], parts: list[dict[str, TorchTensor]]) -> Iterator[Piece]:
    for i, (file, part) in enumerate(zip(files, parts, strict=True)):
        for name, tensor in part.items():
            kind = f"{tensor.kind}, strides {list(tensor.strides)}"
            yield Piece(f"{i:02}/{name}", tensor.shape, kind, file, tensor.data)


def _read_config(
    path: Path, parts: list[dict[str, TorchTensor]], tokenizer: Tokenizer | None, tied: bool
) -> LlamaConfig:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        rest = {key: value for key, value in given.items() if key not in _IGNORED}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}); download or copy the file again"
        ) from error
    try:
        hf = _as_hf(rest, parts)
        if rest:
            raise ConfigError(
                f"fields {sorted(rest)} are not understood. A lost setting gives wrong logits, so "
                "it is refused"
            )
        kinds = {t.dtype for t in parts[0].values() if len(t.shape) > 1 and t.dtype is not None}
        return LlamaConfig.from_hf(
            hf
            | {
                "tie_word_embeddings": tied,
                "dtype": kinds.pop().name if len(kinds) == 1 else "float32",
                "bos_token_id": tokenizer.bos_id if tokenizer else None,
                "eos_token_id": list(tokenizer.eos_ids) if tokenizer else None,
            }
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{path}: field {error} is missing") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} has a field of a wrong type or value ({error})") from error


def _as_hf(rest: dict[str, Any], parts: list[dict[str, TorchTensor]]) -> dict[str, Any]:
    """HF's fields from Meta's, which are popped."""
    dim, heads = rest.pop("dim"), rest.pop("n_heads")
    theta = float(rest.pop("rope_theta", 10_000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    positions = 8192 if theta > 10_000.0 else 4096  # Llama 3; Llama 2
    factor = rest.pop("rope_scaling_factor", None)
    if rest.pop("use_scaled_rope", False):
        factor = factor or _SCALE_OF_DIM.get(dim)
        if factor is None:
            raise ConfigError(
                "'use_scaled_rope' without 'rope_scaling_factor', and no published Llama has "
                f"dim = {dim}; add the factor to the file"
            )
        rope |= {
            "rope_type": "llama3",
            "factor": float(factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": float(rest.pop("high_freq_factor", None) or 4.0),
            "original_max_position_embeddings": 8192,
        }
        positions = 131_072
    width = int(8 * dim / 3)
    multiplier, multiple = rest.pop("ffn_dim_multiplier", None), rest.pop("multiple_of", 256)
    if multiplier is not None:
        width = int(multiplier * width)
    vocab = rest.pop("vocab_size", -1)
    if vocab == -1:  # Llama 2 leaves it to the tokenizer
        embedding = parts[0][_EMBEDDING].shape
        vocab = embedding[0] * (len(parts) if embedding[1] == dim else 1)
    return {
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": -(-width // multiple) * multiple,
        "num_hidden_layers": rest.pop("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": rest.pop("n_kv_heads", None) or heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": rest.pop("norm_eps", 1e-5),
        "rope_parameters": rope,
    }
