"""Calls of functions are told from text, however it comes in pieces."""

import pytest

from alaya_jax.serve.tools import Call, Calls

NAMES = frozenset({"look", "add"})
ADD = Call("add", '{"a": 1}')
LOOK = Call("look", "{}")

CASES = [
    ('{"name": "add", "parameters": {"a": 1}}', "", [ADD]),  # Llama 3
    ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", [ADD]),
    (
        '{"name": "add", "parameters": {"a": 1}}; {"name": "look", "parameters": {}}',
        "",
        [ADD, LOOK],
    ),
    ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [ADD]),  # Qwen
    (
        'I add.\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n'
        '<tool_call>{"name": "look", "arguments": {}}</tool_call>',
        "I add.\n",
        [ADD, LOOK],
    ),
    ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', "", [ADD]),  # Mistral
    ('[{"name": "look"}]', "", [LOOK]),
    # Half a character, as the model said it: no answer could hold it otherwise.
    (r'{"name": "add", "arguments": {"a": "\ud83d"}}', "", [Call("add", r'{"a": "\ud83d"}')]),
    (r'{"name": "add", "arguments": "\ud83d"}', "", [Call("add", r"\ud83d")]),
    ('{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [ADD]),  # a text of JSON already
    # Text, though it begins like a call:
    ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    ('{"name": "add", "param', '{"name": "add", "param', []),
    ("{braces} in a text", "{braces} in a text", []),
    ("a <tool_call> is not JSON", "a <tool_call> is not JSON", []),
    ("1 < 2 <tool", "1 < 2 <tool", []),
    ("", "", []),
    ("  \n", "  \n", []),
    ("[1, 2]", "[1, 2]", []),
]


@pytest.mark.parametrize(("text", "said", "called"), CASES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_text_and_calls(text, said, called, size):
    calls = Calls(NAMES)
    pieces = [calls.put(text[i : i + size]) for i in range(0, len(text), size)]
    rest, found = calls.finish()
    assert "".join(pieces) + rest == said
    assert found == called


def test_text_comes_as_soon_as_it_is_certain():
    calls = Calls(NAMES)
    assert [calls.put(p) for p in ("Hello", " wor", "ld <", "b", "> <tool", "_call>{", "}")] == [
        "Hello",
        " wor",
        "ld ",
        "<b",
        "> ",
        "",
        "",
    ]


def test_without_functions_everything_is_text():
    calls = Calls(frozenset())
    assert calls.put('{"name": "add"') == '{"name": "add"'
    assert calls.finish() == ("", [])
