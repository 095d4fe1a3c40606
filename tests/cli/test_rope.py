"""--rope: a model stretched from the command line."""

import json

import pytest


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "document.txt"
    path.write_text("We the People of the United States. " * 20)
    return path


@pytest.mark.slow
def test_ask_keeps_contexts_by_rope(alaya, tiny_model, document, tmp_path):
    def read(*more):
        options = ("--model", tiny_model, "--context", document, "--db", tmp_path / "a.db")
        done = alaya("ask", *options, *more, "--max-new-tokens", "2", "--json", "Who?")
        return json.loads(done.stdout)["context"]["imported"]

    ropes = [(), ("--rope", "yarn:4"), ("--rope", "yarn:4,4k"), ("--rope", "linear:2")]
    assert [read(*rope) for rope in ropes] == [True] * 4
    assert not any(read(*rope) for rope in ropes)


@pytest.mark.parametrize("text", ["yarn", "yarn:", "yarn:0.5", "ntk:2", "yarn:4,many", "linear:x"])
def test_what_is_no_rope_is_refused_before_a_model_is_read(alaya, text):
    refused = alaya("generate", "--model", "nowhere", "--rope", text, "Hello.", code=2)
    assert "yarn:4" in refused.stderr
