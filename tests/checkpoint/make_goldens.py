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
SHARD_SIZES = {"hf_shards": 20_000, "hf_shards_oversize": 4_000}
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


def hf_shards(name: str, shard_size: int) -> None:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16)
    state = model.state_dict()
    for number, key in enumerate(sorted(state)):
        state[key].copy_(pattern(number, state[key].shape))
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(f"{directory}/whole")
        # Of a loaded model the names are sorted; one never loaded keeps its modules' order.
        loaded = LlamaForCausalLM.from_pretrained(f"{directory}/whole", dtype=torch.bfloat16)
        loaded.save_pretrained(directory, max_shard_size=shard_size)
        files = sorted(Path(directory).glob("model*"))
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    golden = {"config": CONFIG, "shard_size": shard_size, "sha256": digests}
    (GOLDEN / f"{name}.json").write_text(json.dumps(golden, indent=2) + "\n")


META = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 48,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
WIDTH = 112  # int(1.3 * int(8 * 32 / 3)) = 110, rounded up to a multiple of 16
SPLIT = {  # dimension that Meta's tensor parallelism divides
    "tok_embeddings": 0, "output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1,
}  # fmt: skip


def meta_parts() -> None:
    """Meta's layout in two parts, and logits by Meta's formulas: RoPE on neighbours as complex."""
    dim, kv = META["dim"], META["dim"] // 2
    shapes = {"tok_embeddings": (48, dim), "output": (48, dim), "norm": (dim,)}
    for i in range(META["n_layers"]):
        layer = f"layers.{i}."
        shapes |= {layer + "attention_norm": (dim,), layer + "ffn_norm": (dim,)}
        shapes |= {layer + "attention.wq": (dim, dim), layer + "attention.wo": (dim, dim)}
        shapes |= {layer + "attention.wk": (kv, dim), layer + "attention.wv": (kv, dim)}
        shapes |= {layer + f"feed_forward.w{n}": (WIDTH, dim) for n in (1, 3)}
        shapes[layer + "feed_forward.w2"] = (dim, WIDTH)
    torch.manual_seed(0)
    weights = {f"{name}.weight": torch.randn(shape) / 3 for name, shape in shapes.items()}
    weights = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    directory = GOLDEN / "meta"
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps(META))
    for i in range(2):
        part = {}
        for name, value in weights.items():
            axis = SPLIT.get(name.split(".")[-2])
            part[name] = value.clone() if axis is None else value.chunk(2, axis)[i].clone()
        torch.save(part, directory / f"consolidated.{i:02}.pth")
    tokens = torch.arange(0, 48, 5)
    golden = {"tokens": tokens.tolist(), "logits": meta_logits(weights, tokens).tolist()}
    (directory / "logits.json").write_text(json.dumps(golden) + "\n")


def meta_logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    w = {name.removesuffix(".weight"): value.float() for name, value in weights.items()}
    heads, kv_heads, n = META["n_heads"], META["n_kv_heads"], len(tokens)
    head_dim = META["dim"] // heads
    frequencies = META["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.outer(torch.arange(n).double(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[:, None]

    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + META["norm_eps"]) * scale

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = w["tok_embeddings"][tokens]
    mask = torch.full((n, n), float("-inf")).triu(1)
    for i in range(META["n_layers"]):
        a, f = f"layers.{i}.attention.", f"layers.{i}.feed_forward."
        y = norm(x, w[f"layers.{i}.attention_norm"])
        q = rotate((y @ w[a + "wq"].T).view(n, heads, head_dim))
        k = rotate((y @ w[a + "wk"].T).view(n, kv_heads, head_dim))
        v = (y @ w[a + "wv"].T).view(n, kv_heads, head_dim)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / head_dim**0.5 + mask
        x = x + torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1) @ w[a + "wo"].T
        y = norm(x, w[f"layers.{i}.ffn_norm"])
        gated = torch.nn.functional.silu(y @ w[f + "w1"].T) * (y @ w[f + "w3"].T)
        x = x + gated @ w[f + "w2"].T
    return norm(x, w["norm"]) @ w["output"].T


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, shard_size in SHARD_SIZES.items():
        hf_shards(name, shard_size)
    meta_parts()
