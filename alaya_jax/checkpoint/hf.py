"""HF checkpoint directories: `config.json` and safetensors, in one file or in shards with an index.

Headers are parsed here: the stored bytes are needed as they lie (for slices and the fingerprint),
and a damaged file has to be reported with its lengths and what to do, together with every other
problem.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from alaya_jax.checkpoint.order import order_of
from alaya_jax.checkpoint.source import Source, StoredTensor, refuse
from alaya_jax.errors import CheckpointError, ConfigError
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Known types that are no weights of a dense Llama; the sizes are needed to check the file.
_OTHER_ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_AGAIN = "download or copy the file again"


class Damaged(Exception):
    """One file that cannot be used; the message is a line of the report."""


def open_hf(path: Path) -> Source:
    """Opens an HF checkpoint directory. Reads the config, the index and the headers, no weights.

    Raises:
      CheckpointError: there is no config.json or no weights here, or the index is unreadable.
      ConfigError: config.json describes a model that is not understood.
    """
    if (path / ADAPTER).exists():
        raise CheckpointError(_unmerged(path))
    config = read_config(path / "config.json")
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    unreadable: set[str] = set()
    wanted = _weight_files(path)
    for file, names in wanted.items():
        try:
            found = open_safetensors(path / file)
        except Damaged as error:
            unreadable |= names
            problems.append(f"{file}: {error}" + (f" ({len(names)} tensors)" if names else ""))
            continue
        for name in sorted(names - found.keys()):
            problems.append(f"{INDEX} places tensor {name!r} in {file}, which lacks it; {_AGAIN}")
            unreadable.add(name)
        for name, tensor in found.items():
            if name in tensors:
                problems.append(f"tensor {name!r} is in both {tensors[name].file.name} and {file}")
            tensors[name] = tensor
    if problems and not tensors:
        refuse(path, problems)
    stored = {t.dtype for t in tensors.values() if len(t.shape) > 1 and t.dtype is not None}
    if len(stored) == 1:  # config.json says what the writer ran with, not always what is stored
        config = dataclasses.replace(config, dtype=stored.pop().name)
    return Source(
        format="hf",
        path=path,
        config=config,
        tensors=tensors,
        dtype=None,
        quantized=False,
        problems=tuple(problems),
        unreadable=frozenset(unreadable),
        order=order_of({name: tensor.file.name for name, tensor in tensors.items()}),
        read_tokenizer=lambda: Tokenizer.from_directory(path) if has_tokenizer(path) else None,
    )


def _unmerged(path: Path) -> str:
    base = _read_json(path / ADAPTER).get("base_model_name_or_path")
    return (
        f"{path} holds a LoRA adapter ({ADAPTER}), which is not applied here and is no model by "
        f"itself; merge it into its base ({base or 'the model it was trained on'}) with peft's "
        "merge_and_unload, write that with save_pretrained, and load the result"
    )


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds a tokenizer."""
    return any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, not {type(value).__name__}; {_AGAIN}"
        )
    return value


def read_config(path: Path) -> LlamaConfig:
    """The architecture in a config.json.

    Raises:
      CheckpointError: there is none.
      ConfigError: it describes a model that is not understood.
    """
    if not path.exists():
        ggufs = sorted(p.name for p in path.parent.glob("*.gguf"))
        hint = f"; it holds {', '.join(ggufs[:3])}: name that file instead" if ggufs else ""
        raise CheckpointError(
            f"{path.parent} has no config.json, so it is no HF checkpoint directory{hint}"
        )
    try:
        return LlamaConfig.from_hf(_read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{path} has a field of a wrong type or value ({error})") from error


def _weight_files(path: Path) -> dict[str, set[str]]:
    """Files that hold the weights, each with the tensors an index places there.

    Raises:
      CheckpointError: there are none, or those of another model lie beside them.
    """
    wanted = _indexed_files(path)
    others = sorted(p.name for p in path.glob("*.safetensors") if _SHARD.fullmatch(p.name))
    if others := [name for name in others if name not in wanted]:
        used = ", ".join([*([INDEX] if (path / INDEX).exists() else []), *list(wanted)[:3]])
        raise CheckpointError(
            f"{path} holds two sets of weights, {', '.join(others[:3])} and those of {used}; which "
            "is the model's cannot be told: move one of them away"
        )
    return wanted


def _indexed_files(path: Path) -> dict[str, set[str]]:
    if not (path / INDEX).exists():
        if (path / SINGLE).exists():
            return {SINGLE: set()}
        others = sorted(
            p.name for p in path.glob("*") if p.suffix in (".safetensors", ".bin", ".pth")
        )
        raise CheckpointError(
            f"{path} has neither {SINGLE} nor {INDEX}"
            + (f"; it holds {', '.join(others[:5])}, which are not read" if others else "")
            + "; download the safetensors files, or write them with transformers' save_pretrained"
        )
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no 'weight_map'; {_AGAIN}")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A shard lies beside its index; anything else would let an index read the whole disk.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{path / INDEX} places tensor {name!r} in {file!r}, which is not the name of a "
                "safetensors file in the same directory"
            )
        files.setdefault(file, set()).add(name)
    return dict(sorted(files.items()))


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Maps one file: 8 bytes of header length, a JSON header, then the data without holes.

    Raises:
      Damaged: the file cannot be used.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise Damaged(f"cannot be opened ({error.strerror}); download or copy it") from error
    if start == b"version ":
        raise Damaged("is a git-lfs pointer, not the weights; run `git lfs pull`")
    if len(start) < 8:
        raise Damaged(f"is truncated: {size} bytes, not even a header; {_AGAIN}")
    mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
    length = int.from_bytes(start, "little")
    if length > _MAX_HEADER:
        raise Damaged(f"is no safetensors file: its header would be {length:,} bytes; {_AGAIN}")
    if 8 + length > size:
        raise Damaged(f"is truncated in the header ({size:,} of {8 + length:,} bytes); {_AGAIN}")
    try:
        header = json.loads(bytes(mapped[8 : 8 + length]), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        tensors = {name: _header_entry(name, spec) for name, spec in header.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise Damaged(f"has a damaged header ({error}); {_AGAIN}") from error

    body = mapped[8 + length :]
    end = 0
    result: dict[str, StoredTensor] = {}
    for name, (kind, shape, begin, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if begin != end:
            raise Damaged(
                f"has a damaged header: tensor {name!r} does not follow the one before it"
            )
        end = stop
        dtype = _DTYPES.get(kind)
        result[name] = StoredTensor(name, shape, kind, dtype, path, body[begin:stop], _decode)
    if end > body.size:
        raise Damaged(f"is truncated: {size:,} of {8 + length + end:,} bytes; {_AGAIN}")
    if end < body.size:
        raise Damaged(f"has {body.size - end:,} bytes after its last tensor; {_AGAIN}")
    return result


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _header_entry(name: str, spec: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"entry {name!r} is malformed")
    kind, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    numbers = (
        [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    )
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"entry {name!r} is malformed")
    item = _DTYPES[kind].itemsize if kind in _DTYPES else _OTHER_ITEM_BYTES.get(kind)
    if item is not None and math.prod(shape) * item != offsets[1] - offsets[0]:
        raise ValueError(f"the length of tensor {name!r} contradicts its shape and dtype")
    if offsets[1] < offsets[0]:
        raise ValueError(f"entry {name!r} is malformed")
    return kind, tuple(shape), offsets[0], offsets[1]


def _decode(tensor: StoredTensor) -> np.ndarray:
    assert tensor.dtype is not None  # refused before anything is read
    assert tensor.data is not None
    return tensor.data.view(tensor.dtype).reshape(tensor.shape)
