"""The demo answers what transformers answers, on the same weights, and notices when it does not.

make_demo_goldens.py in tests/conformance made the goldens.
"""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from alaya_jax import prompts
from alaya_jax.checkpoint import bundled
from alaya_jax.cli import demo

GOLDENS = Path(__file__).parents[1] / "data" / "goldens" / "demo.json"
NEEDS_MODEL = pytest.mark.skipif(
    bundled.find("smollm2-135m") is None,
    reason="SmolLM2 is not on this machine: `make test` gets it, or `alaya fetch smollm2-135m`",
)


def goldens() -> list[dict]:
    return json.loads(GOLDENS.read_text())


def test_the_goldens_are_those_of_the_questions():
    assert [g["question"] for g in goldens()] == [q.text for q in demo.questions()]
    assert {g["max_new_tokens"] for g in goldens()} == {demo.MAX_NEW_TOKENS}
    for question, golden in zip(demo.questions(), goldens(), strict=True):
        assert question.is_answered_by(golden["answer"])
        # No token of an answer is near a tie, so rounding cannot change it.
        assert min(golden["margins"]) > 0.05


def test_the_text_marks_what_was_added():
    text = demo.document()
    articles = [text.index(f"Article. {n}.\n") for n in ("I", "II", "III", "IV", "V", "VI", "VII")]
    assert articles == sorted(articles)
    schedule = text.index("Schedule.\n\n(Added for a demonstration.")
    assert articles[2] < schedule < articles[3]
    for question in demo.questions():
        found = [text.find(words) for words in question.expected if words in text]
        assert all(schedule < at < articles[3] for at in found)
        assert found
    assert not {"Margaret", "48213", "Baltimore", "lease"} & set(
        (text[:schedule] + text[articles[3] :]).replace(".", "").split()
    )


@pytest.fixture(scope="module")
def tokenizer():
    from alaya_jax.models.tokenizer import Tokenizer

    return Tokenizer.from_gguf(bundled.find("smollm2-135m"))


@NEEDS_MODEL
def test_prompts_are_tokenized_as_by_transformers(tokenizer):
    """Although the document is encoded apart from the template, without control tokens."""
    for golden in goldens():
        ids = prompts.question_ids(tokenizer, demo.document(), golden["question"])
        assert len(ids) == golden["prompt_tokens"]
        assert ids[:8].tolist() == golden["first_ids"]
        assert ids[-24:].tolist() == golden["last_ids"]
        assert zlib.crc32(ids.astype("<i4").tobytes()) == golden["crc32"]


@NEEDS_MODEL
def test_the_document_begins_every_prompt(tokenizer):
    start = prompts.document_ids(tokenizer, demo.document())
    assert len(start) > 5600
    for question in demo.questions():
        ids = prompts.question_ids(tokenizer, demo.document(), question.text)
        np.testing.assert_array_equal(ids[: len(start)], start)
        assert len(ids) - len(start) < 40


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict:
    """What a real `alaya demo --json` said."""
    if bundled.find("smollm2-135m") is None:
        pytest.skip("SmolLM2 is not on this machine")
    command = [sys.executable, "-m", "alaya_jax.cli", "demo", "--json"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_demo_answers_as_transformers(shown):
    assert shown["problems"] == []
    for row, golden in zip(shown["questions"], goldens(), strict=True):
        expected = golden["tokens"]
        for way in ("full", "from_disk"):
            answer = row[way]
            ended = answer["finish_reason"] == "eos"
            assert answer["ids"] == (expected[:-1] if ended else expected)
            assert answer["right"]


@pytest.mark.slow
def test_the_demo_reuses_the_document_and_reads_few_keys(shown):
    tokens = shown["document_tokens"]
    assert shown["cold"]["computed"] > tokens
    for row in shown["questions"]:
        for way in ("full", "dipr", "from_disk"):
            assert row[way]["reused"] == tokens
            assert row[way]["prefilled"] < 40
            assert row[way]["first_token_s"] < shown["cold"]["first_token_s"]
        full, dipr = row["full"]["keys_per_step"], row["dipr"]["keys_per_step"]
        assert full["attended"] == full["scanned"] == full["visible"] > tokens
        # The window is 640 keys.
        assert 640 < dipr["attended"] < full["attended"] / 2
        assert dipr["scanned"] == full["visible"]
    assert sum(row["agree"] for row in shown["questions"]) >= 3


def result(**changes) -> dict:
    """The least of a demo's result that its checks read, all well."""
    answer = {"text": "It is 48213.", "ids": [1, 2], "reused": 10, "right": True}
    row = {"question": "Which?", "expected": ["48213"], "full": answer, "from_disk": answer}
    for name, change in changes.items():
        row[name] = row[name] | change
    return {"document_tokens": 10, "questions": [row]}


def test_the_demo_notices_what_is_wrong():
    assert demo.find_problems(result()) == []
    (wrong,) = demo.find_problems(result(full={"right": False, "text": "No."}))
    assert "'No.'" in wrong
    assert "'48213'" in wrong
    (other,) = demo.find_problems(result(from_disk={"ids": [1, 3]}))
    assert "otherwise from disk" in other
    (cold,) = demo.find_problems(result(from_disk={"reused": 0}))
    assert "from disk reused only 0" in cold


def test_a_wrong_answer_is_exit_code_1(alaya, monkeypatch):
    bad = result(full={"right": False, "text": "No."})
    monkeypatch.setattr(demo, "_run", lambda path: bad)
    shown = alaya("demo", "--json", code=1)
    assert json.loads(shown.stdout)["problems"]
    assert "the demo did not go as it should: 'Which?'" in shown.stderr
