"""What a checkpoint is, as plain data, without loading it."""

import dataclasses
import math
from typing import Any

from alaya_jax.checkpoint.identity import identify
from alaya_jax.checkpoint.params import match
from alaya_jax.checkpoint.source import Source
from alaya_jax.progress import progress_bar

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def inspect_source(source: Source) -> dict[str, Any]:
    """Describes an opened checkpoint; see `alaya_jax.checkpoint.inspect`."""
    pairs = match(source)
    config, tensors = source.config, [tensor for _, tensor in pairs]
    total = sum(tensor.nbytes for tensor in tensors)
    with progress_bar("reading weights", total, "bytes") as advance:
        identity = identify(source, tensors, advance=advance)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    stored: dict[str, int] = {}
    for tensor in tensors:
        stored[tensor.stored_dtype] = stored.get(tensor.stored_dtype, 0) + math.prod(tensor.shape)
    tokenizer = source.read_tokenizer()
    return {
        "path": str(source.path),
        "format": source.format,
        "fingerprint": identity,
        "parameters": parameters,
        "parameters_by_stored_type": stored,
        "max_length": config.max_length,
        "config": dataclasses.asdict(config),
        "tokenizer": None
        if tokenizer is None
        else {"vocab_size": tokenizer.vocab_size, "chat_template": tokenizer.chat is not None},
        "bytes": {
            "stored": total,
            "weights": {dtype: parameters * item for dtype, item in _ITEM_BYTES.items()},
            "kv_per_token": {dtype: config.kv_width * item for dtype, item in _ITEM_BYTES.items()},
        },
        "tensors": {
            "/".join(entry.path): {
                "stored_as": tensor.name,
                "stored_shape": list(tensor.shape),
                "stored_dtype": tensor.stored_dtype,
                "file": tensor.file.name,
                "shape": list(entry.shape),
                "axes": list(entry.logical_axes),
            }
            for entry, tensor in pairs
        },
    }
