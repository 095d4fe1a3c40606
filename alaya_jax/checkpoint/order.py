"""In which order the tensors of an HF checkpoint fill its files.

transformers 4 saves a model in the order of its modules, as checkpoints published before 2026 are;
transformers 5 sorts the names of a model that it has loaded.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any, Literal

Order = Literal["names", "modules"]

_MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


def place(name: str, order: Order) -> tuple[Any, ...]:
    """Sorts HF names of a Llama's tensors into an order; names that no Llama has come last."""
    if order == "names":  # numbers as numbers
        return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split("."))
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found and found[2] in _MODULES:
        return 1, int(found[1]), _MODULES.index(found[2]), found[3] == "bias"
    known = {"model.embed_tokens.weight": 0, "model.norm.weight": 2, "lm_head.weight": 3}
    return known.get(name, 4), 0, 0, False


def order_of(files: Mapping[str, str]) -> Order:
    """The order in which a checkpoint's files were filled: the one that goes back to an earlier
    file less often; "names" where both do so equally often.

    Args:
      files: the file of each tensor, named in the order of the files.
    """

    def steps_back(order: Order) -> int:
        placed = [files[name] for name in sorted(files, key=lambda name: place(name, order))]
        return sum(a > b for a, b in itertools.pairwise(placed))

    return "modules" if steps_back("modules") < steps_back("names") else "names"
