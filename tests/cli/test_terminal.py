"""What is printed on a terminal of 80 columns that takes nothing but ASCII."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest
import typer

from alaya_jax.cli import app, runtime
from alaya_jax.cli.terminal import say, speak_plainly
from alaya_jax.optimizer.cost import Machine

DOCUMENT = "The Senate shall meet on the first Monday of December. " * 20


@pytest.fixture
def on_a_terminal(monkeypatch, cache):
    """Runs something on a terminal of 80x24 and gives its lines, as they stand in the end."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(runtime, "start_jax", lambda: None)  # jax belongs to all tests
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    printed = bytearray()

    def read():
        while True:
            try:
                printed.extend(os.read(master, 4096))
            except OSError:  # closed at the other end
                return

    reader = threading.Thread(target=read)
    reader.start()

    def run(act) -> list[str]:
        for name in ("stdout", "stderr"):
            stream = open(os.dup(slave), "w", encoding="ascii")  # noqa: SIM115
            monkeypatch.setattr(sys, name, stream)
        speak_plainly()
        act()
        sys.stdout.close()
        sys.stderr.close()
        os.close(slave)
        reader.join(timeout=60)
        monkeypatch.undo()
        text = bytes(printed).decode("ascii")  # nothing else came, or this fails
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        return [line.split("\r")[-1] for line in text.replace("\r\n", "\n").split("\n")]

    yield run
    os.close(master)


def command(*arguments, code=0):
    def act():
        with pytest.raises(SystemExit) as ended:
            app([str(a) for a in arguments])
        assert (ended.value.code or 0) == code

    return act


def words(lines) -> str:
    return " ".join(" ".join(lines).split())


def leaves(group, path=()):
    for name, below in group.commands.items():
        yield (*path, name)
        if getattr(below, "commands", None):
            yield from leaves(below, (*path, name))


@pytest.mark.parametrize("verb", [(), *leaves(typer.main.get_command(app))], ids=" ".join)
def test_help_fits(on_a_terminal, verb):
    lines = on_a_terminal(command(*verb, "--help"))
    assert max(map(len, lines)) <= 80
    listed = "\n".join(lines).split("\nCommands:\n")[1:]
    assert "..." not in "".join(listed), "a first sentence is too long to be listed whole"


def test_answers_and_reports_fit(on_a_terminal, tiny_model, tmp_path):
    title = "d\u00e9claration-\u2019-which-has-a-long-name-" + 4 * "that-goes-on-" + ".txt"
    document = tmp_path / title
    document.write_text(DOCUMENT)
    fixed = ("--model", tiny_model, "--context", document, "--db", tmp_path / "db")

    def act():
        command("ask", *fixed, "--max-new-tokens", 3, "Caf\u00e9?")()
        command("explain", *fixed, "--max-new-tokens", 3, "--attention", "topk:5@flat", "When?")()
        for verb in ("ls", "stats", "check"):
            command("db", verb, "--db", tmp_path / "db")()
        command("inspect", tiny_model)()
        command("fetch")()

    lines = on_a_terminal(act)
    whole = words(lines)
    for said in (
        "tokens reused",
        "1 context",
        "needed: keys",
        "intact",
        "vocabulary",
        "recovery",
        "Apache",
    ):
        assert said in whole
    assert "d\\xe9claration-\\u2019-which" in whole
    # A path is not broken: it has a line of its own, or ends the one where it stands.
    long = [line for line in lines if len(line) > 80]
    assert [line for line in long if len(max(line.split(), key=len)) < 60] == []
    held = next(line for line in lines if " held " in line)
    assert re.search(r"held +\S+ [kM]B of keys and values$", held)


def test_a_plan_fits(on_a_terminal, tiny_model, monkeypatch):
    paper = Machine("paper", 1e10, 1e11, 1e10, 1e-4, 1e-4, 5e-6, 1e-6, 1e-9, 1e-6)
    monkeypatch.setattr("alaya_jax.optimizer.situation.machine_for", lambda *_, **__: paper)
    lines = on_a_terminal(command("plan", tiny_model, "--length", "4k"))
    assert max(map(len, lines)) <= 80
    assert "for want of a calibration of this model (aj.calibrate, alaya calibrate)" in words(lines)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["db", "ls", "--db", "caf\u00e9"], 1, "there is no database at caf\\xe9; check --db"),
        (["summarize\u2019"], 2, "No such command 'summarize\\u2019'"),
        (["ask", "--context", "caf\u00e9.txt", "Who?"], 2, "caf\\xe9.txt"),
        (["inspect", "no-such-model-" + 6 * "long-"], 1, "no checkpoint 'no-such-model-long-"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_fit(on_a_terminal, arguments, code, said):
    lines = on_a_terminal(command(*arguments, code=code))
    assert said in words(lines)
    assert max(map(len, lines)) <= 80


def test_lines_are_folded_between_words_below_their_text(on_a_terminal):
    row = "stored as    " + "one two three " * 8
    lines = on_a_terminal(lambda: say(row.rstrip() + "\n\n  indented " + "word " * 20 + "/a" * 60))
    assert lines[0].startswith("stored as    one two three")
    assert lines[1].startswith(" " * 13 + "one") or lines[1].startswith(" " * 13 + "t")
    assert lines[2] == ""
    assert lines[4].startswith("  word")
    assert any(line.strip() == "/a" * 60 for line in lines), "a path stays whole"
