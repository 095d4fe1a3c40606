"""The model class of lm-eval, where that is installed: `pip install 'alaya_jax[eval]'`.

What it does with tokens is tested without it in `test_answering.py`.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from alaya_jax.errors import RequestError

HERE = Path(__file__).parent
GOLDENS = json.loads((HERE / "goldens.json").read_text())

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_way_out_is_said():
    with pytest.raises(ImportError, match=r"pip install 'alaya_jax\[eval\]'"):
        importlib.import_module("alaya_jax.evaluation.lm_eval")


@pytest.fixture(scope="module")
def alaya_lm():
    from alaya_jax.evaluation.lm_eval import AlayaLM

    lm = AlayaLM("smollm2-135m", dtype="float32", batch_size=4, max_length=2048)
    yield lm
    lm.close()


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of lm-eval and what it imports
def test_local_tasks_score_what_the_hf_model_scores(alaya_lm, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.chdir(HERE / "local")
    tasks = ["local_capitals", "local_passages", "local_answers"]
    manager = TaskManager(include_path=".")
    samples = lm_eval.simple_evaluate(model=alaya_lm, tasks=tasks, task_manager=manager)["samples"]
    scores = [pair for s in samples["local_capitals"] for ((pair,),) in zip(s["resps"])]
    for (logprob, is_greedy), row in zip(scores, GOLDENS["pairs"], strict=True):
        assert float(logprob) == pytest.approx(row["logprob"], abs=1e-3)
        assert is_greedy == row["is_greedy"]
    for sample, row in zip(samples["local_passages"], GOLDENS["texts"], strict=True):
        assert float(sample["resps"][0][0]) == pytest.approx(row["logprob"], abs=1e-3)
    answers = [sample["resps"][0][0] for sample in samples["local_answers"]]
    assert answers == [row["answer"] for row in GOLDENS["answers"]]


@needs_lm_eval
@pytest.mark.slow
def test_a_conversation_is_what_the_template_prints(alaya_lm):
    text = alaya_lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = alaya_lm.tok_encode(text)
    assert ids[0] == 1
    assert ids.count(2) == text.count("<|im_end|>")
    assert "message" in alaya_lm.chat_template(True)
    assert alaya_lm.chat_template(False) is None
    with pytest.raises(RequestError, match="give no name"):
        alaya_lm.chat_template("mine")


@needs_lm_eval
@pytest.mark.parametrize(
    ("settings", "words"),
    [({"device": "tpu"}, "JAX_PLATFORMS"), ({"attention": "all"}, "no attention policy")],
)
def test_a_setting_that_is_not_to_be_had(settings, words):
    from alaya_jax.evaluation.lm_eval import AlayaLM

    with pytest.raises(RequestError, match=words):
        AlayaLM("smollm2-135m", **settings)


@needs_lm_eval
@pytest.mark.slow
def test_the_command_line_says_what_is_wrong_in_a_line(tmp_path):
    command = [sys.executable, "-m", "alaya_jax.evaluation.lm_eval", "--model", "alaya_jax"]
    settings = ["--model_args", "pretrained=no-such-model", "--tasks", "local_capitals"]
    include = ["--include_path", str(HERE / "local")]
    ended = subprocess.run([*command, *settings, *include], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "error: " in ended.stderr.splitlines()[-1]
    assert "no-such-model" in ended.stderr
