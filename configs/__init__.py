"""Known architectures, as the `config.json` their publishers ship, one file a model.

They describe what a checkpoint is, never how it is run. Token ids are those of the instruct
variants. `llama-tiny` is not a published model: it is small, and has every part of a Llama 3.1.
"""

import json
from importlib import resources
from typing import Any

from alaya_jax.errors import ConfigError


def names() -> tuple[str, ...]:
    """Returns the names `load` knows, sorted."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json")))


def load(name: str) -> dict[str, Any]:
    """Returns a known architecture as the dictionary its HF `config.json` holds.

    Args:
      name: one of `names()`, such as `"llama-3.1-8b"`.

    Returns:
      a fresh dictionary, ready for `alaya_jax.models.config.LlamaConfig.from_hf`.

    Raises:
      ConfigError: no architecture has this name.
    """
    if name not in names():
        raise ConfigError(
            f"no architecture is named {name!r}; known are {', '.join(names())}. For another one, "
            "give LlamaConfig.from_hf the config.json that stands beside its checkpoint"
        )
    return json.loads((resources.files(__name__) / f"{name}.json").read_text(encoding="utf-8"))
