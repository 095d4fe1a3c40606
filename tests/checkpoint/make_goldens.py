"""Writes the small files of `golden/` with transformers and torch: run by hand in the peers' env.

python tests/checkpoint/make_goldens.py
"""

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).parent / "golden"
SHARD_SIZE = 20_000
CONFIG = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


def pattern(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Values of the tensor with this place among the sorted names; the tests compute them too."""
    n = torch.Size(shape).numel()
    return (((torch.arange(n) * 31 + number * 7) % 251 - 125) / 64).reshape(shape)


def hf_shards() -> None:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
    state = model.state_dict()
    for number, name in enumerate(sorted(state)):
        state[name].copy_(pattern(number, state[name].shape))
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, max_shard_size=SHARD_SIZE)
        files = sorted(Path(directory).glob("model*"))
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    golden = {"config": CONFIG, "shard_size": SHARD_SIZE, "sha256": digests}
    (GOLDEN / "hf_shards.json").write_text(json.dumps(golden, indent=2) + "\n")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    hf_shards()
