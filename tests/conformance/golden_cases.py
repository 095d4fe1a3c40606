"""Which tiny models and RoPE settings make_goldens.py has transformers compute."""

from __future__ import annotations

from dataclasses import dataclass, field

LONG = 160  # tokens: 2.5 times the original length (64) of the scaled RoPE cases


@dataclass(frozen=True)
class Case:
    """One tiny model. `spelling` is the form of the RoPE fields in its config.json."""

    name: str
    heads: int
    kv_heads: int
    hidden: int = 48
    head_dim: int | None = None
    vocab: int = 128
    rope: dict = field(default_factory=lambda: {"rope_type": "default"})
    max_positions: int = 256
    shape: tuple[int, int] = (2, 40)
    spelling: str = "new"
    type_key: str = "rope_type"  # older files say "type"
    tied: bool = False
    biases: bool = False
    dtype: str = "float32"
    shards: int = 1


CASES = [
    Case("default_gqa1", heads=4, kv_heads=4, vocab=131),
    Case(
        "linear_gqa3_tied",
        heads=6,
        kv_heads=2,
        tied=True,
        shape=(1, LONG),
        spelling="old",
        type_key="type",
        rope={"rope_type": "linear", "factor": 2.5},
    ),
    Case(
        "dynamic_gqa4",
        heads=8,
        kv_heads=2,
        hidden=64,
        shape=(1, LONG),
        max_positions=64,
        rope={"rope_type": "dynamic", "factor": 2.0},
    ),
    Case(
        "llama3_gqa4_sharded",
        heads=4,
        kv_heads=1,
        hidden=64,
        shape=(1, LONG),
        spelling="old",
        shards=3,
        rope={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    Case(
        "yarn_gqa8",
        heads=8,
        kv_heads=1,
        head_dim=16,
        shape=(1, LONG),
        rope={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    Case(
        "yarn_mscale_tied",
        heads=3,
        kv_heads=1,
        shape=(1, LONG),
        spelling="old",
        tied=True,
        rope={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    ),
    Case("biases_gqa3", heads=6, kv_heads=2, biases=True),
    Case("head_dim_gqa2_tied", heads=4, kv_heads=2, head_dim=20, tied=True),
    Case("bf16_gqa4", heads=8, kv_heads=2, hidden=64, shape=(1, 96), dtype="bfloat16"),
]

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
QWEN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1000000.0}
ROPE_CASES = [  # name, rope_parameters, head_dim, max_position_embeddings, sequence length
    ("llama-3-8b", {"rope_type": "default", "rope_theta": 500000.0}, 128, 8192, None),
    ("smollm2-135m", {"rope_type": "default", "rope_theta": 100000.0}, 64, 8192, None),
    ("llama-3.1-8b", LLAMA31, 128, 131072, None),
    ("llama-3.2-1b", {**LLAMA31, "factor": 32.0}, 64, 131072, None),
    ("llama-3.2-3b", {**LLAMA31, "factor": 32.0}, 128, 131072, None),
    ("llama3-tiny", LLAMA31, 16, 131072, None),
    ("linear", {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, 64, 8192, None),
    (
        "dynamic-at-original",
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        64,
        2048,
        2048,
    ),
    (
        "dynamic-shorter",
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        64,
        2048,
        100,
    ),
    (
        "dynamic-longer",
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        64,
        2048,
        5000,
    ),
    ("yarn", YARN, 128, 16384, None),
    ("yarn-no-truncate", {**YARN, "truncate": False}, 128, 16384, None),
    ("yarn-attention-factor", {**YARN, "attention_factor": 0.75}, 64, 16384, None),
    ("yarn-betas", {**YARN, "beta_fast": 24.0, "beta_slow": 3.0}, 64, 16384, None),
    (
        "yarn-mscale",
        {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
        64,
        163840,
        None,
    ),
    (
        "yarn-mscale-equal",
        {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        64,
        163840,
        None,
    ),
    ("yarn-mscale-alone", {**YARN, "factor": 40.0, "mscale": 0.8}, 64, 163840, None),
    (
        "yarn-implied-original",
        {k: v for k, v in YARN.items() if not k.startswith("original")},
        64,
        4096,
        None,
    ),
    # The length before stretching in max_position_embeddings: Qwen (both ways), Vicuna.
    ("yarn-qwen", {**QWEN, "original_max_position_embeddings": 32768}, 128, 32768, None),
    ("yarn-qwen-short", QWEN, 128, 32768, None),
    ("linear-vicuna", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 128, 4096, None),
]
