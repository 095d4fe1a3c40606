"""Writes HF checkpoints: safetensors in shards with an index, config and tokenizer, for any reader.

Files are what transformers' `save_pretrained` writes, byte for byte in the weights: the same shards
for the same shard size (see `order`), the same order in a shard, the same header.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.checkpoint.hf import INDEX, SINGLE, open_safetensors
from alaya_jax.checkpoint.identity import Digest
from alaya_jax.checkpoint.order import Order, place
from alaya_jax.checkpoint.source import Source
from alaya_jax.checkpoint.weights import KINDS, Weight, blocks, count_nonfinite
from alaya_jax.models.config import LlamaConfig

_PART = ".part"
_WRITERS = 2  # tensors in memory at once: the promise is twice the largest
# What a checkpoint directory holds beside weights and config that belongs to the model.
_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
)
_TEMPLATES = "additional_chat_templates"  # the named ones, each in a file


def write_weights(
    directory: Path,
    weights: list[Weight],
    shard_size: int,
    wrote: Callable[[Weight, Digest, int], None],
    order: Order = "names",
) -> None:
    """Writes all weights into a directory; shards that are there already are kept.

    A shard has its name only when it is complete and on the disk.

    Args:
      directory: an existing directory.
      weights: every parameter of the model.
      shard_size: most bytes of tensors in a file; a larger tensor gets a file of its own.
      wrote: called for each weight with its digest and the number of its values that are not
        finite.
      order: the order in which they fill the files.
    """
    shards = plan_shards(weights, shard_size, order)
    for file, shard in shards.items():
        if not (directory / file).exists():
            _write_shard(directory / file, shard, wrote)
            continue
        found = open_safetensors(directory / file)
        for weight in shard:
            kept = Weight(weight.entry, found[weight.entry.hf], "hf", weight.dtype)
            wrote(
                weight,
                kept.digest(kept.layout("hf")),
                sum(map(count_nonfinite, blocks(kept.layout("hf"), kept.dtype))),
            )
    if len(shards) > 1:
        total = {
            "total_parameters": sum(w.nbytes // w.dtype.itemsize for w in weights),
            "total_size": sum(w.nbytes for w in weights),
        }
        places = {w.entry.hf: file for file, shard in shards.items() for w in shard}
        write_json(directory / INDEX, {"metadata": total, "weight_map": places})


def plan_shards(
    weights: list[Weight], shard_size: int, order: Order = "names"
) -> dict[str, list[Weight]]:
    """Which weights each file holds: in this order, each file filled before the next.

    A tensor larger than a shard has a file to itself, before the one that is being filled, which
    then goes on: as save_pretrained does it.
    """
    shards: list[list[Weight]] = []
    filling: list[Weight] = []
    for weight in sorted(weights, key=lambda w: place(w.entry.hf, order)):
        if weight.nbytes > shard_size:
            shards.append([weight])
            continue
        if sum(w.nbytes for w in filling) + weight.nbytes > shard_size:
            shards.append(filling)
            filling = []
        filling.append(weight)
    if filling:
        shards.append(filling)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    n = len(shards)
    return {f"model-{i:05}-of-{n:05}.safetensors": s for i, s in enumerate(shards, 1)}


def _write_shard(
    path: Path, shard: list[Weight], wrote: Callable[[Weight, Digest, int], None]
) -> None:
    # The format's own library puts the widest types first, so that all are aligned.
    shard = sorted(shard, key=lambda w: (-w.dtype.itemsize, _RANK[w.dtype.name], w.entry.hf))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in shard:
        begin, end = end, end + weight.nbytes
        header[weight.entry.hf] = {
            "dtype": KINDS[weight.dtype],
            "shape": list(weight.entry.stored_shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    part = path.with_name(path.name + _PART)
    with part.open("wb") as file, ThreadPoolExecutor(_WRITERS) as writers:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        file.truncate(start + end)
        writing = []
        for weight in shard:
            at = start + header[weight.entry.hf]["data_offsets"][0]
            writing.append(writers.submit(_write_one, file.fileno(), at, weight))
        try:
            for weight, written in zip(shard, writing, strict=True):
                wrote(weight, *written.result())
        except BaseException:
            writers.shutdown(cancel_futures=True)
            raise
        os.fsync(file.fileno())
    part.rename(path)


def _write_one(file: int, at: int, weight: Weight) -> tuple[Digest, int]:
    view = weight.layout("hf")
    digest, nonfinite = weight.digest(view), 0
    for block in blocks(view, weight.dtype):
        nonfinite += count_nonfinite(block)
        data = block.reshape(-1).view(np.uint8).data
        while len(data):
            count = os.pwrite(file, data, at)
            data, at = data[count:], at + count
    weight.tensor.release()
    return digest, nonfinite


_RANK = {"float32": 0, "bfloat16": 1, "float16": 2}
"""Order of types of one width in a file, as the safetensors library has it."""


def write_beside(directory: Path, source: Source, config: LlamaConfig) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files.

    Files of an HF or Orbax source are taken as they are, so that nothing in them is lost; only the
    config's dtype follows what is written. From other formats they are made.

    Raises:
      TokenizerError: the source's tokenizer is damaged.
    """
    tokenizer = source.read_tokenizer()
    if has_hf_files(source):
        for name in _BESIDE:
            if (source.path / name).is_file():
                shutil.copyfile(source.path / name, directory / name)
        for file in (source.path / _TEMPLATES).glob("*.jinja"):
            (directory / _TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(file, directory / _TEMPLATES / file.name)
        _copy_config(source.path / "config.json", directory / "config.json", config)
        return
    write_json(directory / "config.json", published_config(config))
    eos = list(tokenizer.eos_ids if tokenizer and tokenizer.eos_ids else config.eos_token_ids)
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
    }
    generation = {name: value for name, value in generation.items() if value is not None}
    write_json(directory / "generation_config.json", generation)
    if tokenizer is not None:
        (directory / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        write_json(directory / "tokenizer_config.json", tokenizer.to_config())


def has_hf_files(source: Source) -> bool:
    """Whether config and tokenizer of a source lie beside its weights in HF's spelling."""
    return source.format in ("hf", "orbax") and (source.path / "config.json").is_file()


def _copy_config(path: Path, to: Path, config: LlamaConfig) -> None:
    given = json.loads(path.read_text(encoding="utf-8"))
    if LlamaConfig.from_hf(given).dtype == config.dtype:
        shutil.copyfile(path, to)
        return
    spelling = "dtype" if "dtype" in given else "torch_dtype"
    write_json(to, given | {spelling: config.dtype})


def published_config(config: LlamaConfig) -> dict[str, Any]:
    """config.json as Meta's repositories spell it, which all versions of transformers read."""
    hf = config.to_hf()
    rope = hf.pop("rope_parameters")
    hf["rope_theta"] = rope.pop("rope_theta")
    hf["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    hf["torch_dtype"] = hf.pop("dtype")
    return hf


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON file as HF formats them."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")
