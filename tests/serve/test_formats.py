"""Texts that must be something: JSON of a schema, or a call of a function."""

import json

import jsonschema
import pytest

from alaya_jax.models.chat import ChatTemplate
from alaya_jax.serve.formats import one_call

from .conftest import HELLO, chat, complete, events

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"$ref": "#/$defs/colour"},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
    "$defs": {"colour": {"enum": ["red", "green"]}},
}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True},
}
HOT = {"temperature": 2, "seed": 3, "max_tokens": 200}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}
LOOK = {"type": "function", "function": {"name": 'look "é"'}}


def test_json_of_a_schema_whole_and_streamed(client):
    (choice,) = chat(client, response_format=FORMAT, logprobs=True, **HOT)["choices"]
    assert choice["finish_reason"] == "stop"
    text = choice["message"]["content"]
    jsonschema.validate(json.loads(text), SCHEMA)
    assert "".join(c["token"] for c in choice["logprobs"]["content"]) == text
    body = {"messages": HELLO, "stream": True, "response_format": FORMAT} | HOT
    pieces = events(client.post("/v1/chat/completions", json=body))
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces) == text
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_any_object_and_several_texts(client):
    said = complete(client, n=3, response_format={"type": "json_object"}, **HOT)
    for choice in said["choices"]:
        assert choice["text"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)


def test_text_asks_for_nothing(client):
    plain = complete(client, max_tokens=4)["choices"][0]
    assert complete(client, response_format={"type": "text"}, max_tokens=4)["choices"][0] == plain


def test_as_many_tokens_as_must_be(client, engine):
    (first,) = complete(client)["choices"]
    ids = engine.db.model.encode(first["text"], add_special_tokens=False).tolist()
    end = {"stop_token_ids": ids[:1]}
    assert complete(client, **end)["usage"]["completion_tokens"] == 0
    assert complete(client, min_tokens=5, **end)["usage"]["completion_tokens"] >= 5


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"paint", 'look "é"'}),
        ({"type": "function", "function": {"name": "paint"}}, {"paint"}),
        ({"type": "function", "function": {"name": 'look "é"'}}, {'look "é"'}),
    ],
)
def test_a_call_that_is_forced(client, choice, names):
    asked = {"tools": [PAINT, LOOK], "tool_choice": choice, "parallel_tool_calls": False} | HOT
    (said,) = chat(client, **asked)["choices"]
    assert said["finish_reason"] == "tool_calls"
    assert said["message"]["content"] is None
    (call,) = said["message"]["tool_calls"]
    name, given = call["function"]["name"], json.loads(call["function"]["arguments"])
    assert name in names
    if name == "paint":
        jsonschema.validate(given, SCHEMA)
    else:
        assert given == {}
    body = {"messages": HELLO, "stream": True} | asked
    *_, called, last = events(client.post("/v1/chat/completions", json=body))
    (delta,) = called["choices"][0]["delta"]["tool_calls"]
    assert delta["function"] == call["function"]
    assert last["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_off_is_text(client):
    asked = {"tools": [PAINT], "tool_choice": "required", "max_tokens": 3}
    (said,) = chat(client, **asked)["choices"]
    assert said["finish_reason"] == "length"
    assert "tool_calls" not in said["message"]
    assert '{"name": "paint"'.startswith(said["message"]["content"])


@pytest.mark.parametrize(
    ("source", "begins"),
    [
        ("{{- '\"parameters\": ' }}{{ tool_call.arguments | tojson }}", '"parameters": '),
        ('{{ "<tool_call>{\\"name\\": 1, \\"arguments\\": 2}" }}', '"arguments": '),
        ("{{ messages }}", '"arguments": '),
    ],
)
def test_a_call_has_the_form_that_the_template_shows(source, begins):
    constraint = one_call([PAINT], ChatTemplate(source))
    assert json.dumps(begins)[1:-1] in constraint.lark
    assert ("<tool_call>" in constraint.lark) == ("<tool_call>" in source)


def test_a_salt_shares_with_its_own_kind_only(client, served):
    """Neither stored contexts nor running requests of others, and the same text all the same."""
    text = "Once upon a time there was a king who had three daughters. " * 6
    served.db.import_context(text, title="stored", progress=False)
    body = {"prompt": text + "The", "max_tokens": 4}

    def cached(said):
        return said["usage"]["prompt_tokens_details"]["cached_tokens"]

    plain, mine = complete(client, **body), complete(client, cache_salt="mine", **body)
    assert cached(plain) > 50
    assert cached(mine) == 0
    assert mine["choices"] == plain["choices"]
    both = complete(client, cache_salt="mine", **body | {"n": 2})
    assert cached(both) == 0
    document = {"messages": HELLO, "document": text, "max_tokens": 2, "cache_salt": "mine"}
    assert cached(chat(client, **document)) == 0


def test_running_requests_share_within_a_salt(engine):
    from alaya_jax.engine import Request

    ids = list(range(5, 105))
    salts = ("one", "one", "other", "")
    first, *others = engine.run([Request(ids, 12, cache_salt=salt) for salt in salts])
    assert [r.cached_tokens > 0 for r in others] == [True, False, False]
    assert {r.ids for r in others} == {first.ids}
