"""Known methods of sparse attention as whole configurations, to compare under equal keys read.

A policy is a function of the architecture and of how many keys a head may read outside its window:

    policy = policies.get("quest")
    aj.generate(session, rest, attention=policy(model.config, keys=1024))

Each is one small file whose function `attention` returns what `aj.generate(attention=...)` takes.
docs/add-a-policy.md says how to add one.
"""

import importlib
from collections.abc import Callable
from typing import Any

from alaya_jax.errors import RequestError

NAMES = ("streaming_llm", "infllm", "quest", "retrieval_attention", "alayadb", "recovery")
"""In the order of their publication; the last is this library's own."""


def get(name: str) -> Callable[..., Any]:
    """The function `attention(config, keys=..., **options)` of a policy.

    Raises:
      RequestError: there is none of that name.
    """
    if name not in NAMES:
        raise RequestError(f"policy {name!r}: use one of {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{name}").attention
