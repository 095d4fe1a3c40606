"""What every verb shares with the terminal: help, errors, notes, reports, interruption.

stdout carries the answer or the report, with --json exactly one JSON object; stderr all else.
"""

import inspect
import io
import json
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from alaya_jax.errors import AlayaError


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a word on what became of the work."""


class Commands(TyperGroup):
    """Turns errors into one paragraph on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb."""
        with _ctrl_c() as pressed:
            try:
                return super().invoke(ctx)
            except AlayaError as error:
                _fail(str(error))
            except KeyboardInterrupt as error:
                note(f"\nInterrupted. {error}".rstrip())
                raise typer.Exit(130) from error
            except BrokenPipeError:
                raise  # the reader of stdout went away: Typer ends without a word
            except OSError as error:
                if error.filename is None:
                    raise
                _fail(f"{error.filename}: {error.strerror}")
            except (ImportError, SystemError) as error:
                if not pressed:
                    raise
                # A module in C that is interrupted while it is loaded makes such an error of it.
                note("\nInterrupted.")
                raise typer.Exit(130) from error
            except Exception as error:
                usage: Any = error
                if not hasattr(usage, "show"):
                    raise
                usage.show(file=sys.stderr)  # the command was not understood; see `_print`
                raise typer.Exit(usage.exit_code) from error


@contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """A list that grows when Ctrl-C is pressed in the block; what Ctrl-C does stays as it is."""
    pressed: list[int] = []
    with _on_ctrl_c(lambda before, *args: (pressed.append(args[0]), before(*args))):
        yield pressed


@contextmanager
def _on_ctrl_c(act: Callable[..., object]) -> Iterator[None]:
    """Ctrl-C in the block calls `act(before, number, frame)`, `before` being what it did before."""
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *args: act(before, *args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def load_jax() -> None:
    """Imports jax. Ctrl-C waits for that: modules in C make other errors of it, or print it."""
    waiting: list[Callable[[], object]] = []
    with _on_ctrl_c(lambda before, *args: waiting.append(lambda: before(*args))):
        import jax

        del jax
    for act in waiting[:1]:
        act()


def help_text(function: Callable[..., Any]) -> str:
    """A verb's docstring as help: paragraphs with indented lines (examples) keep their lines."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    return "\n\n".join("\b\n" + p if "\n  " in p else p for p in paragraphs)


def _fail(message: str) -> None:
    if os.environ.get("ALAYA_DEBUG"):
        traceback.print_exc()
    error = typer.style("error:", fg="red", bold=True) if _colours(sys.stderr) else "error:"
    _print(f"{error} {message}", sys.stderr)
    raise typer.Exit(1)


def _colours(stream: Any) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR")


def note(text: str) -> None:
    """Says something beside the answer: on stderr, dim on a terminal."""
    _print(text, sys.stderr, dim=_colours(sys.stderr))


def say(text: str) -> None:
    """Prints a part of a report on stdout."""
    _print(text, sys.stdout)


def _print(text: str, stream: Any, *, dim: bool = False) -> None:
    """Prints whole lines, on a terminal folded between words.

    Not by `typer.echo`: where a stream takes ASCII only, that writes UTF-8 all the same.
    """
    if stream is not None and stream.isatty():
        width = os.get_terminal_size(stream.fileno()).columns or 80
        text = "\n".join(_folded(line, width) for line in text.split("\n"))
    print(typer.style(text, dim=True) if dim else text, file=stream, flush=True)


def _folded(line: str, width: int) -> str:
    """A line in lines of a width, the later ones indented to where the first one's text begins.

    That is behind the name in a row of a name and a value. Words, such as paths, stay whole.
    """
    name = re.match(r" *\S[^:]{0,16}:?  +(?=\S)| *", line)
    indent = " " * len(name.group() if name else "")
    return textwrap.fill(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )


def report(data: dict[str, Any]) -> None:
    """Prints the one JSON object of --json."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    print(json.dumps(data, ensure_ascii=encoding != "utf8"))


def speak_plainly() -> None:
    """Lets stdout and stderr take any text: what their encoding lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def show(found: Any) -> None:
    """Prints a table on stdout: drawn by rich on a terminal, plain text elsewhere."""
    if not sys.stdout.isatty():
        say(str(found))
        return
    from rich.console import Console

    console = Console()
    console.print(found.to_rich(console.width) if hasattr(found, "to_rich") else found)


@contextmanager
def on_interrupt(consequence: str) -> Iterator[None]:
    """Ctrl-C in the block ends the command, saying what that means for its work."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(consequence) from error
