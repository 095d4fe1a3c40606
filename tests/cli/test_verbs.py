"""Verbs that run a model, on a tiny random one: reuse, reports, and what goes wrong."""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from alaya_jax.db import DB
from alaya_jax.models import chat
from alaya_jax.storage import ContextHeader, PoolStore
from alaya_jax.storage.lock import writers_turn

DOCUMENT = "We the People of the United States:\n\n" + "The Senate shall meet on Monday. " * 12


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "document.txt"
    file.write_text(DOCUMENT)
    return file


@pytest.fixture
def ask(alaya, tiny_model, document, tmp_path):
    def run(*arguments, code=0, **options):
        fixed = ("ask", "--model", tiny_model, "--context", document, "--db", tmp_path / "db")
        return alaya(*fixed, "--max-new-tokens", 8, *arguments, code=code, **options)

    return run


# Ctrl-C reaches the command even where the test run ignores it, as a job in the background does.
COMMAND = """
import signal
from alaya_jax.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


def process(*arguments, **options):
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        **options,
    )


def test_ask_reads_a_document_once(ask):
    first = json.loads(ask("--json", "When?").stdout)
    again = json.loads(ask("--json", "Who meets on Monday?").stdout)
    same = json.loads(ask("--json", "When?").stdout)
    tokens = first["context"]["tokens"]
    assert [r["context"]["imported"] for r in (first, again, same)] == [True, False, False]
    assert len({r["context"]["id"] for r in (first, again, same)}) == 1
    for result in (first, again, same):
        assert result["reused"] >= tokens - 2
        assert result["reused"] + result["prefilled"] == result["prompt_tokens"]
        assert result["generated"] == 8
        assert result["finish_reason"] == "length"
        assert result["first_token_s"] > 0
        assert result["keys_per_step"]["attended"] == result["keys_per_step"]["visible"]
    assert first["ids"] == same["ids"]
    assert first["answer"] == first["text"] != ""


def test_ask_finds_a_document_by_content(ask, alaya, tiny_model, tmp_path):
    ask("When?")
    other = tmp_path / "copy.md"
    other.write_text(DOCUMENT)
    arguments = ("ask", "--model", tiny_model, "--db", tmp_path / "db", "--max-new-tokens", 1)
    result = json.loads(alaya(*arguments, "--context", other, "--json", "When?").stdout)
    assert not result["context"]["imported"]
    piped = alaya(*arguments, "--context", "-", "--json", "When?", stdin=DOCUMENT)
    assert not json.loads(piped.stdout)["context"]["imported"]
    other.write_text(DOCUMENT + "Never.")
    result = json.loads(alaya(*arguments, "--context", other, "--json", "When?").stdout)
    assert result["context"]["imported"]


def test_ask_stores_in_8_bits_and_says_so_again(ask):
    """Whoever does not ask for them never gets keys and values that are not exact."""
    first, again, exact = (
        json.loads(ask("--json", *options, "When?").stdout)["context"]
        for options in (("--store-dtype", "int8"), ("--store-dtype", "int8"), ())
    )
    assert (first["imported"], again["imported"], exact["imported"]) == (True, False, True)
    assert (first["id"] == again["id"], first["id"] == exact["id"]) == (True, False)
    assert first["bytes"] < exact["bytes"] / 2


def test_ask_puts_the_answer_on_stdout_and_notes_on_stderr(ask):
    said = ask("When?")
    answer = json.loads(ask("--json", "When?").stdout)["answer"]
    assert said.stdout == answer + "\n"
    assert "tokens reused" in said.stderr
    assert "keys read per step" in said.stderr
    assert "--max-new-tokens allows more" in said.stderr


@pytest.mark.slow
def test_attention_policies_read_what_they_say(ask):
    full = json.loads(ask("--json", "When?").stdout)["keys_per_step"]
    everything = json.loads(ask("--json", "--attention", "dipr:1e9", "When?").stdout)
    assert everything["keys_per_step"] == full
    topk = json.loads(ask("--json", "--attention", "topk:1", "When?").stdout)["keys_per_step"]
    assert topk["scanned"] == full["visible"]
    window = json.loads(ask("--json", "--attention", "window:4,32", "When?").stdout)
    assert window["keys_per_step"]["attended"] == 36 < full["attended"]
    assert window["attention"] == "Window(sink=4, recent=32)"


def test_sampling_options_arrive(ask):
    def ids(*options):
        return json.loads(ask("--json", "When?", *options).stdout)["ids"]

    assert ids("--temperature", 5, "--seed", 1) == ids("--temperature", 5, "--seed", 1)
    assert ids("--temperature", 5, "--seed", 1) != ids("--temperature", 5, "--seed", 2)
    assert ids("--temperature", 5, "--top-k", 1) == ids()
    stop = json.loads(ask("--json", "When?").stdout)["answer"][1:3]
    stopped = json.loads(ask("--json", "--stop", stop, "When?").stdout)
    assert stopped["finish_reason"] == "stop"
    assert stop not in stopped["answer"]


def test_generate_raw_and_chat(alaya, tiny_model):
    def generate(*arguments, **options):
        fixed = ("generate", "--model", tiny_model, "--max-new-tokens", 5, "--json")
        return json.loads(alaya(*fixed, *arguments, **options).stdout)

    raw, chat = generate("--raw", "We the"), generate("--chat", "We the")
    assert raw["format"] == "raw"
    assert raw["prompt_tokens"] < chat["prompt_tokens"]
    assert generate("We the") | {"first_token_s": 0, "tokens_per_s": 0} == chat | {
        "first_token_s": 0,
        "tokens_per_s": 0,
    }
    assert generate(stdin="We the")["ids"] == chat["ids"]
    assert chat["generated"] == 5


def test_generate_starts_from_a_stored_prefix_and_leaves_the_database_alone(
    ask, alaya, tiny_model, tmp_path
):
    ask("When?")
    arguments = ("generate", "--model", tiny_model, "--max-new-tokens", 2, "--json", DOCUMENT)
    cold, warm = (
        json.loads(alaya(*arguments, *more).stdout) for more in ((), ("--db", tmp_path / "db"))
    )
    assert cold["reused"] == 0 < warm["reused"]
    assert cold["ids"] == warm["ids"]
    missing = alaya(*arguments, "--db", tmp_path / "missing", code=1)
    assert "there is no database" in missing.stderr
    assert not (tmp_path / "missing").exists()


def test_inspect_a_model(alaya, tiny_model):
    data = json.loads(alaya("inspect", tiny_model, "--json").stdout)
    # two tables of 290 x 32; in each of two layers q, o, k, v, the mlp and two norms; the last norm
    layer = 2 * 64 * 32 + 2 * 32 * 32 + 3 * 64 * 32 + 2 * 32
    assert data["parameters"] == 2 * 290 * 32 + 2 * layer + 32
    assert data["bytes"]["stored"] == data["bytes"]["weights"]["float32"] == 4 * data["parameters"]
    assert data["bytes"]["kv_per_token"] == {"float32": 512, "bfloat16": 256, "float16": 256}
    text = alaya("inspect", tiny_model).stdout
    assert f"{data['parameters']:,}" in text
    assert data["fingerprint"] in text
    assert "default, theta 10,000" in text


def test_inspect_and_look_after_a_database(ask, alaya, tmp_path):
    id = json.loads(ask("--json", "When?").stdout)["context"]["id"]
    db = tmp_path / "db"
    listed = json.loads(alaya("db", "ls", "--db", db, "--json").stdout)
    assert json.loads(alaya("inspect", db, "--json").stdout) == listed
    assert [c["id"] for c in listed["contexts"]] == [id]
    assert "document.txt" in alaya("db", "ls", "--db", db).stdout
    assert "intact" in alaya("db", "check", "--db", db).stdout
    assert "no context has this id" in alaya("db", "rm", "xyz", "--db", db, code=1).stderr
    removed = json.loads(alaya("db", "rm", id[:6], "--db", db, "--json").stdout)
    assert removed["removed"] == [id]
    assert json.loads(alaya("db", "ls", "--db", db, "--json").stdout)["contexts"] == []


def test_contexts_under_a_fingerprint_of_samples_are_named(alaya, tmp_path):
    """An earlier version stored one; a fingerprint of all bytes, or one that was given, is none."""
    kv = np.zeros((1, 3, 4), np.float32)
    with PoolStore(tmp_path / "db") as store:
        for print in ("0f" * 32, "0f" * 32 + "-int8", "v2-" + "0" * 61, "tiny"):
            shape = {"dtype": "float32", "num_layers": 1, "num_kv_heads": 1, "head_dim": 4}
            header = ContextHeader(fingerprint=print, page_size=16, **shape)
            store.write(header, [1, 2, 3], lambda start: [(kv, kv)])
    listed = json.loads(alaya("db", "ls", "--db", tmp_path / "db", "--json").stdout)["contexts"]
    problems = {c["model"][:3] + c["model"][64:]: c["problem"] for c in listed}
    assert problems["v2-"] is problems["tin"] is None
    assert "earlier version" in problems["0f0"]
    assert problems["0f0"] == problems["0f0-int8"]
    assert alaya("db", "ls", "--db", tmp_path / "db").stdout.count("import the document again") == 2


def test_a_graph_is_built_shown_and_mended(ask, alaya, tiny_model, tmp_path):
    id = json.loads(ask("--json", "When?").stdout)["context"]["id"]
    db = tmp_path / "db"
    assert "--graph" in alaya("db", "index", id, "--db", db, code=2).stderr
    missing = ask("--attention", "dipr:50@graph", "When?", code=1).stderr
    assert f"alaya db index {id} --graph" in missing
    assert "alaya db rm" not in missing  # that would destroy the work, not mend it
    build = ("db", "index", id[:6], "--graph", "--model", tiny_model, "--db", db, "--json")
    built = json.loads(alaya(*build).stdout)
    assert built["context"] == id
    assert "graph index" in alaya("inspect", db).stdout
    (listed,) = json.loads(alaya("db", "ls", "--db", db, "--json").stdout)["contexts"]
    assert listed["indexes"] == {"graph": built["bytes"]}
    next(db.glob("indexes/*/layer_001*")).unlink()
    report = alaya("db", "check", "--db", db, code=1)
    assert "alaya db index" in report.stdout
    assert "alaya db rm" not in report.stderr
    assert json.loads(alaya(*build).stdout) == built
    assert "intact" in alaya("db", "check", "--db", db).stdout


def test_a_damaged_context_is_refused_and_can_be_replaced(ask, alaya, tmp_path):
    first = json.loads(ask("--json", "When?").stdout)
    id, db = first["context"]["id"], tmp_path / "db"
    (layer,) = db.glob("segments/*/k.001")
    with layer.open("r+b") as file:
        byte = file.read(101)[100]
        file.seek(100)
        file.write(bytes([byte ^ 1]))

    way_out = f"alaya db rm {id} --db {db}"
    assert way_out in ask("--json", "When?", code=1).stderr
    report = alaya("db", "check", "--db", db, code=1)
    assert "damaged" in report.stdout
    assert way_out in report.stderr
    assert json.loads(alaya("db", "check", "--db", db, "--json", code=1).stdout)["damaged"] == [id]
    alaya("db", "rm", id, "--db", db)
    assert json.loads(ask("--json", "When?").stdout)["ids"] == first["ids"]


def test_a_database_that_is_written_can_be_listed_by_another_process(tmp_path):
    path = tmp_path / "db"
    with PoolStore(path), writers_turn(path / "lock"):
        out, err = (done := process("db", "ls", "--db", path)).communicate(timeout=60)
    assert done.returncode == 0, err
    assert "0 contexts" in out


def test_ask_reads_beside_others(ask, tmp_path):
    ask("When?")
    with PoolStore(tmp_path / "db") as store, writers_turn(store.path / "lock"):
        assert not json.loads(ask("--json", "Who?").stdout)["context"]["imported"]


def test_databases_that_cannot_be_opened(alaya, tiny_model, document, tmp_path):
    fixed = ("ask", "--model", tiny_model, "--context", document, "When?", "--db")
    assert "is a file" in alaya(*fixed, document, code=1).stderr
    assert "error: " in alaya(*fixed, document / "db", code=1).stderr
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    assert "holds other files" in alaya(*fixed, full, code=1).stderr
    assert [p.name for p in full.iterdir()] == ["thesis.tex"]


def test_prompts_that_are_too_long(ask, document, tmp_path):
    document.write_text(DOCUMENT * 60)
    stderr = ask("When?", code=1).stderr
    assert "8,000" in stderr
    assert "shorten it" in stderr
    document.write_text(DOCUMENT)
    assert "--memory SIZE" in ask("--memory", "100KB", "When?", code=1).stderr
    assert "8,000" in ask("--max-new-tokens", 8000, "When?", code=1).stderr


def test_damaged_models(alaya, tiny_model, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    assert "truncated" in alaya("generate", "--model", gguf, "Hi", code=1).stderr
    assert "truncated" in alaya("inspect", gguf, code=1).stderr
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    stderr = alaya("generate", "--model", copy, "Hi", code=1).stderr
    assert "model.safetensors" in stderr
    assert "Traceback" not in stderr
    shutil.copy(tiny_model / "model.safetensors", weights)
    (copy / "tokenizer.json").unlink()
    stderr = alaya("generate", "--model", copy, "Hi", code=1).stderr
    assert "tokenizer.json" in stderr


def test_an_interrupted_import_stores_nothing(ask, alaya, monkeypatch, tmp_path):
    def interrupted(self, session, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DB, "store", interrupted)
        result = ask("When?", code=130)
    assert "Interrupted. The document was not stored" in result.stderr
    assert result.stdout == ""
    db = tmp_path / "db"
    assert json.loads(alaya("db", "ls", "--db", db, "--json").stdout)["contexts"] == []
    assert list((db / "segments").iterdir()) == []


def test_an_interrupted_answer_is_kept(tiny_model, cache):
    fixed = ("generate", "--model", tiny_model, "--max-new-tokens", 7900, "--raw", "We the")
    running = process(*fixed)
    assert running.stdout is not None
    first = running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    rest, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert (first + rest).endswith("\n")
    assert "Interrupted. The text so far is complete on stdout." in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_compiled_programs_are_kept_for_the_next_process(tiny_model, cache, monkeypatch):
    """The second process finds the model's, says nothing of it, and gives the same answer."""
    for setting in ("JAX_COMPILATION_CACHE_DIR", "ALAYA_COMPILATION_CACHE"):
        monkeypatch.delenv(setting, raising=False)  # what other tests compiled
    kept, answers = [], []
    for _ in range(2):
        arguments = ("generate", "--model", tiny_model, "--max-new-tokens", 4, "We the", "--json")
        out, err = (done := process(*arguments)).communicate(timeout=120)
        assert done.returncode == 0, err
        assert err == ""
        answers.append(json.loads(out)["ids"])
        entries = [p.name for p in (cache / "xla").glob("jax-*/*-cache")]
        kept.append(sorted(e for e in entries if e.startswith(("jit_layers-", "jit_end-"))))
    assert kept[0] == kept[1]
    assert [entry.split("-")[0] for entry in kept[0]] == ["jit_end", "jit_layers", "jit_layers"]
    assert answers[0] == answers[1]


def test_ls_says_what_is_not_exact(alaya, tmp_path):
    """In a line of its own, shortened; in full with --json."""
    plan = "DIPR(beta=50.0, window=Window(sink=128, recent=512)) through Sketch(bits=4)"
    header = ContextHeader(
        fingerprint="f",
        dtype="float32",
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        page_size=16,
        origin=((7, plan),),
    )
    with PoolStore(tmp_path / "db") as store:
        store.write(header, np.arange(9), lambda start: [np.zeros((2, 1, 9, 2), np.float32)])
    shown = alaya("db", "ls", "--db", tmp_path / "db").stdout
    assert "not exact: from token 7 on by DIPR(beta=50.0," in shown
    assert max(map(len, shown.splitlines()[2:])) <= 80
    listed = json.loads(alaya("db", "ls", "--db", tmp_path / "db", "--json").stdout)
    assert listed["contexts"][0]["origin"] == [{"from": 7, "plan": plan}]


def test_ls_tells_models_and_namespaces_apart(alaya, tmp_path):
    """Also those of one file that was quantized in two ways."""
    digest = "v2-" + "0123456789abcdef" * 4
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 2, "page_size": 16}
    each = {
        "model v2-012345678": {"fingerprint": digest},
        "model v2-012345678-int8-2": {"fingerprint": f"{digest}-int8-2"},
        "namespace team": {"fingerprint": "mine", "namespace": "team"},
    }
    with PoolStore(tmp_path / "db") as store:
        for header in each.values():
            made = ContextHeader(dtype="float32", **shape, **header)
            store.write(made, np.arange(9), lambda start: [np.zeros((2, 1, 9, 2), np.float32)])
    lines = alaya("db", "ls", "--db", tmp_path / "db").stdout.splitlines()
    shown = {line.strip() for line in lines[2::2]}
    assert shown == {
        "model v2-012345678",
        "model v2-012345678-int8-2",
        "model mine, namespace team",
    }


DATED = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "{{ strftime_now('%d %b %Y') }}<|eot_id|>{% for m in messages %}<|start_header_id|>user"
    "<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
)


def test_a_document_keeps_its_date_unless_another_is_asked_for(
    alaya, llama3, document, tmp_path, monkeypatch
):
    model, said = llama3(DATED), []

    def ask(day, *arguments):
        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime(2026, 11, day)

        monkeypatch.setattr(chat, "datetime", Day)
        fixed = ("ask", "--model", model, "--context", document, "--db", tmp_path / "db", "--json")
        result = alaya(*fixed, "--max-new-tokens", 2, *arguments, "Who?")
        said.append(result.stderr)
        return json.loads(result.stdout)["context"]["imported"]

    assert [ask(day) for day in (27, 27, 28)] == [True, False, False]
    assert "27 Nov 2026" not in said[1]
    assert "was read on 27 Nov 2026, which the model takes for today" in said[2]
    assert ask(28, "--date", "2026-11-28")
    assert not ask(29, "--date", "2026-11-28")
    assert "today" not in "".join(said[3:])


def test_ask_waits_for_another_writer_and_says_so(ask, tmp_path, caplog):
    path = tmp_path / "db"
    PoolStore(path).close()
    begun, done = threading.Event(), threading.Event()

    def hold():
        with writers_turn(path / "lock"):
            begun.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait(60)
    threading.Timer(4, done.set).start()
    ask("Who?")
    holder.join()
    assert f"waiting for process {os.getpid()} since 20" in caplog.text
