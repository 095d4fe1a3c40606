"""What RULER's items are made from in the tests: small, and of this repository."""

import json
import re
from pathlib import Path

from alaya_jax.evaluation.tasks import vocabulary

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "alaya_jax" / "cli" / "data" / "constitution.txt").read_text("utf-8")
PARAGRAPHS = [part for part in TEXT.split("\n\n") if len(part) > 120]
WORDS = vocabulary.own()


def count(text: str) -> int:
    """Tokens, without a model: words and the signs between them."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?]) +", text)


def squad() -> str:
    """In the form of SQuAD 2.0: an article of ten paragraphs each, a question to each."""
    articles = []
    for start in range(0, 80, 10):
        paragraphs = []
        for number, text in enumerate(PARAGRAPHS[start : start + 10], start):
            words = text.split()
            asked = [
                {"question": f"Who is {n}?", "is_impossible": n % 3 == 2, "answers": answers}
                for n in (number, number + 1)
                for answers in [[{"text": words[0]}, {"text": words[n % len(words)]}]]
            ]
            paragraphs.append({"context": text, "qas": asked})
        articles.append({"paragraphs": paragraphs})
    return json.dumps({"data": articles})


def hotpotqa() -> str:
    """In the form of HotpotQA: rows of ten documents, each of a title and sentences."""
    rows = []
    for number in range(12):
        chosen = [PARAGRAPHS[(number * 7 + i) % len(PARAGRAPHS)] for i in range(10)]
        context = [[f"Part {i}", sentences(text)] for i, text in enumerate(chosen)]
        rows.append(
            {"question": f"What of {number}?", "answer": chosen[0].split()[0], "context": context}
        )
    return json.dumps(rows)
