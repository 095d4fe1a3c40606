"""The simulator of jax 0.11 prints a race and goes on; here it fails the test."""

from collections.abc import Iterator

import pytest

RACE = "RACE DETECTED"


@pytest.fixture(autouse=True)
def no_races(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    out = capsys.readouterr().out
    assert RACE not in out, out
