"""The commands that pages and the command's own help print are commands that parse."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    if page.name not in ("CHANGELOG.md", "decisions.md")  # which are of their day
]


def printed_in(text: str) -> list[str]:
    """Indented lines that run `alaya`, without prompt and comment."""
    lines = re.findall(r"^ {4,}(?:\S+/)?(?:[^`#\n]*\| )?(alaya [^#\n]*)", text, re.MULTILINE)
    return [line.strip() for line in lines]


def mentioned_in(text: str) -> list[str]:
    """`alaya ...` within a sentence: a verb, perhaps with some of its arguments. a|b is two."""
    found = []
    for words in re.findall(r"`(alaya [^`]*)`", " ".join(text.split())):
        parts = [word.split("|") for word in words.split(" ")]
        found += [" ".join(command) for command in itertools.product(*parts)]
    return found


def verb_of(words: list[str]):
    """The command of a line: its context, and the arguments that are left."""
    from alaya_jax.cli import app

    command, arguments = typer.main.get_command(app), words[1:]
    context = command.make_context("alaya", [], resilient_parsing=True)
    while getattr(command, "commands", None) is not None and arguments:
        if arguments[0].startswith("-"):
            break
        assert arguments[0] in command.commands, f"there is no {arguments[0]!r}: {words}"
        command = command.commands[arguments[0]]
        context = type(context)(command, info_name=arguments[0], parent=context)
        arguments = arguments[1:]
    return context, arguments


def cases(find) -> list:
    rows = [(page.name, found) for page in PAGES for found in find(page.read_text("utf-8"))]
    return [pytest.param(text, id=f"{page}: {text}") for page, text in dict.fromkeys(rows)]


def leaves(command, path: str = "alaya"):
    """Every verb of the command line: what is typed, and its command."""
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, f"{path} {name}")
    if getattr(command, "commands", None) is None:
        yield path, command


def verbs() -> list:
    from alaya_jax.cli import app

    return [pytest.param(*verb, id=verb[0]) for verb in leaves(typer.main.get_command(app))]


def parses(line: str) -> None:
    """Its verb, its options, their values, and that no argument is missing or left over."""
    line = re.split(r"   | > ", line)[0]  # what it does, or where its output goes
    words = [word for word in shlex.split(line) if word != "..."]
    context, arguments = verb_of(words)
    command = context.command
    with command.make_context(context.info_name, arguments, parent=context.parent) as parsed:
        assert parsed.command is command


@pytest.mark.parametrize("line", cases(printed_in))
def test_a_command_in_a_block_parses(line):
    parses(line)


@pytest.mark.parametrize(("path", "command"), verbs())
def test_the_help_of_a_verb_has_examples_that_parse(path, command):
    examples = re.findall(r"^  (?:[^`#\n]*\| )?(alaya [^#\n]*)", command.help, re.MULTILINE)
    assert any(example.startswith(path) for example in examples)
    for example in examples:
        parses(example)


@pytest.mark.parametrize("words", cases(mentioned_in))
def test_a_command_that_a_sentence_mentions_is_there(words):
    context, arguments = verb_of(words.split())
    known = {option for parameter in context.command.params for option in parameter.opts}
    known |= set(context.help_option_names)
    for word in arguments:
        assert not word.startswith("-") or word in known, f"{words}: {word}"


def test_commands_are_found_on_pages():
    """So that another way of printing them cannot leave them untested."""
    assert len(cases(printed_in)) >= 6
    assert len(cases(mentioned_in)) >= 20
