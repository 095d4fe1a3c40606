"""`alaya eval`: what it refuses, and a whole run that is killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from alaya_jax.evaluation import suite as suites

COMMAND = """
import dataclasses, sys
from alaya_jax.cli import main
from alaya_jax.evaluation import suite
suite.SUITES["quick"] = suite.Suite("quick", (1100,), (("niah_single_1", 1),), 1, 0, 0, 2)
main()
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--legal", "nowhere"], "nowhere is not there"),
        (["--essay", "nowhere.txt"], "nowhere.txt is not there"),
        (["--squad", "nowhere.json"], "nowhere.json is not a file"),
    ],
)
def test_what_is_not_there(alaya, arguments, words):
    assert words in " ".join(alaya("eval", *arguments, code=2).stderr.split())


def test_a_model_that_is_not_there(alaya, tmp_path):
    result = alaya("eval", tmp_path / "no-model", "--out", tmp_path / "out", code=1)
    assert "no-model" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "best"], "policies best: use some of full, streaming_llm, infllm"),
        (["--keys", "2"], "keys=2.0: a share of the keys"),
    ],
)
def test_settings_that_mean_nothing(alaya, tiny_model, tmp_path, arguments, words):
    result = alaya("eval", tiny_model, "--out", tmp_path / "out", *arguments, code=1)
    assert words in " ".join(result.stderr.split())


def test_a_run_in_few_words(alaya, tiny_model, tmp_path, monkeypatch):
    small = suites.Suite("quick", (1100,), (), 1, 0, 0, 1)
    monkeypatch.setitem(suites.SUITES, "quick", small)
    monkeypatch.chdir(tmp_path)
    arguments = ("eval", tiny_model, "--policy", "streaming_llm", "--out", "deep/out")
    found = json.loads(alaya(*arguments, "--json").stdout)
    assert (found["done"], found["total"], found["questions"]) == (2, 2, 1)
    assert [row["policy"] for row in found["policies"]] == ["full", "streaming_llm"]
    assert found["report"] == "deep/out/report.html"
    page = (tmp_path / "deep" / "out" / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    again = alaya(*arguments)
    assert "streaming_llm" in again.stdout
    assert "Wrote deep/out/report.html." in again.stderr
    assert max(map(len, again.stdout.splitlines()[:4])) <= 80


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(tiny_model, tmp_path):
    """All policies; what was answered is not asked again."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", COMMAND, "eval", str(tiny_model), "--out", "out", "--json"]
    lines = tmp_path / "out" / "answers.jsonl"

    def run():
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe)

    first = run()
    deadline = time.monotonic() + 600
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 5):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = lines.read_bytes()
    stdout, stderr = run().communicate(timeout=600)
    found = json.loads(stdout)
    assert (found["done"], found["total"]) == (24, 24), stderr
    assert lines.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert len(lines.read_bytes().splitlines()) == 24
    assert [row["policy"] for row in found["policies"]][:3] == ["full", "streaming_llm", "infllm"]
    assert not (tmp_path / "out" / "contexts.db").exists()
