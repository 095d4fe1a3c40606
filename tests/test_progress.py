"""Bars for whoever watches a terminal, and nothing for who does not."""

import io

import pytest
import rich.console

from alaya_jax.progress import progress_bar


@pytest.fixture
def stderr(monkeypatch):
    """What is written to it; a terminal if asked for."""

    def made(terminal):
        out = io.StringIO()
        console = rich.console.Console

        def here(**options):
            assert options == {"stderr": True}
            return console(file=out, force_terminal=terminal, width=100, legacy_windows=False)

        monkeypatch.setattr(rich.console, "Console", here)
        return out

    return made


def test_silent_off_a_terminal(stderr):
    out = stderr(False)
    with progress_bar("reading", 10) as advance:
        advance(10)
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("unit", "said"), [("tokens", "10/10"), ("steps", "steps,"), ("bytes", "10/10 bytes")]
)
def test_a_terminal_sees_title_amount_and_rate(stderr, unit, said):
    out = stderr(True)
    with progress_bar("reading", 10, unit) as advance:
        advance(4)
        advance(6)
    assert "reading" in out.getvalue()
    assert said in out.getvalue()


def test_not_even_there_when_not_wanted(stderr):
    out = stderr(True)
    with progress_bar("reading", 10, show=False) as advance:
        advance(10)
    assert "reading" not in out.getvalue()


def test_an_error_inside_goes_through(stderr):
    stderr(True)
    with pytest.raises(KeyError), progress_bar("reading", 10):
        raise KeyError
