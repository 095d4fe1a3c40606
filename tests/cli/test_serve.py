"""`alaya serve`, up to where it begins to serve; tests/serve has the rest."""

import importlib.util

import pytest


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--attention", "dipr"], "dipr"),
        (["--api-key", ""], "api-key"),
        (["--port", "70000"], "port"),
    ],
)
def test_options_are_checked_before_anything_starts(alaya, options, said):
    assert said in alaya("serve", *options, code=2).stderr


def test_without_the_extra_it_says_what_to_install(alaya, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name)
    )
    said = alaya("serve", code=1).stderr
    assert "uvicorn" in said
    assert "alaya_jax[serve]" in said
