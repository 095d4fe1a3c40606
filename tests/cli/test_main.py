"""`python -m alaya_jax.cli` is `alaya`."""

import runpy
import sys

import pytest

import alaya_jax


def test_the_module_runs_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alaya", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("alaya_jax.cli.__main__", run_name="__main__")
    assert ended.value.code in (0, None)
    assert alaya_jax.__version__ in capsys.readouterr().out
