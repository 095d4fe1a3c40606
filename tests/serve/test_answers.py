"""Log-probabilities and calls of functions in the words of OpenAI's API."""

import dataclasses
from typing import Any

import pytest

import alaya_jax as aj

from .conftest import GREEDY, HELLO, chat, complete, events, expected


def test_logprobs_of_a_chat(client, engine):
    model = engine.db.model
    ids = model.encode(model.chat.render(HELLO))
    alone = expected(engine, ids, sampling=aj.Greedy(logprobs=3))
    (choice,) = chat(client, logprobs=True, top_logprobs=3)["choices"]
    content = choice["logprobs"]["content"]
    assert [c["logprob"] for c in content] == pytest.approx([t.logprob for t in alone.tokens])
    for said, token in zip(content, alone.tokens, strict=True):
        assert bytes(said["bytes"]) == model.tokenizer.piece(token.id)
        tops = [t["logprob"] for t in said["top_logprobs"]]
        assert tops == pytest.approx([p for _, p in token.alternatives])
        assert said["top_logprobs"][0]["bytes"] == said["bytes"]  # greedy
    assert (
        b"".join(bytes(c["bytes"]) for c in content).decode(errors="replace")
        == (choice["message"]["content"])
    )
    plain = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(c["top_logprobs"] == [] for c in plain)


def test_echo_with_logprobs_scores_the_prompt(client, engine):
    """As lm-eval asks for the likelihood of a text."""
    ids = engine.db.model.encode("Once upon a time there was").tolist()
    body = {"prompt": [ids, ids[:4]], "echo": True, "logprobs": 1, "max_tokens": 1}
    said = complete(client, **body)
    for choice, given in zip(said["choices"], (ids, ids[:4]), strict=True):
        scored = choice["logprobs"]
        assert len(scored["tokens"]) == len(given) + 1
        assert scored["token_logprobs"][0] is None
        assert scored["top_logprobs"][0] is None
        alone = expected(
            engine, given, max_new_tokens=1, prompt_logprobs=True, sampling=aj.Greedy(logprobs=1)
        )
        assert scored["token_logprobs"][1:-1] == pytest.approx(alone.prompt_logprobs[1:])
        assert choice["text"] == engine.db.model.tokenizer.decode(given) + alone.text
        for own, top, best in zip(
            scored["token_logprobs"][1:-1],
            scored["top_logprobs"][1:-1],
            alone.prompt_alternatives[1:],
            strict=True,
        ):
            assert max(top.values()) == pytest.approx(max(own, best[0][1]))
            assert own in top.values()
        offsets = scored["text_offset"]
        assert choice["text"][offsets[-1] :] == alone.text
        assert offsets == sorted(offsets)
    only = complete(client, **body | {"max_tokens": 0})
    assert only["usage"]["completion_tokens"] == 0
    first, again = said["choices"][0]["logprobs"], only["choices"][0]["logprobs"]
    assert again["token_logprobs"] == pytest.approx(first["token_logprobs"][:-1])


def test_what_greedy_decoding_said_is_greedy(client, engine):
    said = complete(client, max_tokens=8, logprobs=0)
    ids = engine.db.model.encode("Once").tolist()
    alone = expected(engine, ids, max_new_tokens=8)
    body = {"prompt": [*ids, *alone.ids], "echo": True, "logprobs": 1, "max_tokens": 0}
    scored = complete(client, **body)["choices"][0]["logprobs"]
    mine = slice(len(ids), None)
    for own, top in zip(scored["token_logprobs"][mine], scored["top_logprobs"][mine], strict=True):
        assert own == max(top.values())
    generated = said["choices"][0]["logprobs"]["token_logprobs"]
    assert scored["token_logprobs"][mine] == pytest.approx(generated, abs=1e-4)


def test_echo_without_logprobs_says_the_prompt_as_it_was_given(client):
    plain = complete(client)["choices"][0]["text"]
    assert complete(client, echo=True)["choices"][0]["text"] == "Once" + plain


def test_offsets_are_places_in_the_text(client):
    """Also behind a BOS, which a text that was given has not, and with parts of characters."""
    prompt = "Once é ☃ upon"
    (choice,) = complete(client, prompt=prompt, echo=True, logprobs=0)["choices"]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert any(token.startswith("bytes:") for token in tokens)
    assert tokens[0] == "<|begin_of_text|>"
    assert offsets[:2] == [0, 0]
    for token, start, end in zip(tokens[1:], offsets[1:], offsets[2:], strict=False):
        if not token.startswith("bytes:"):
            assert choice["text"][start:end].endswith(token)
    assert choice["text"].startswith(prompt)


def test_prompt_logprobs(client, engine):
    (choice,) = chat(client, prompt_logprobs=1)["choices"]
    model = engine.db.model
    ids = model.encode(model.chat.render(HELLO)).tolist()
    first, *rows = choice["prompt_logprobs"]
    assert first is None
    assert len(rows) == len(ids) - 1
    for id, row in zip(ids[1:], rows, strict=True):
        assert str(id) in row
        assert row[str(id)]["decoded_token"].encode() == model.tokenizer.piece(id)


class Said:
    """A running request whose model writes what it is told to: random weights call no function."""

    def __init__(self, running: Any, tokens: list[aj.Token]):
        self._running, self._tokens = running, tokens
        self.cancel = running.cancel

    async def __aiter__(self):
        for token in self._tokens:
            yield token

    def __await__(self):
        result = yield from self._running.__await__()
        text = "".join(token.text for token in self._tokens)
        return dataclasses.replace(result, text=text, finish_reason="eos")


def test_tools_are_called(client, engine, monkeypatch):
    written = '{"name": "look", "parameters": {"at": "it"}}'
    ids = engine.db.model.encode(written, add_special_tokens=False).tolist()
    stream, submit = engine.db.model.tokenizer.stream(), engine.submit
    tokens = [aj.Token(id, stream.put(id), 0.0) for id in ids]
    monkeypatch.setattr(engine, "submit", lambda *args, **k: Said(submit(*args, **k), tokens))
    tools = [{"type": "function", "function": {"name": "look"}}]
    (choice,) = chat(client, tools=tools)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"] == {"name": "look", "arguments": '{"at": "it"}'}
    body = {"messages": HELLO, "tools": tools, "stream": True} | GREEDY
    *_, called, last = events(client.post("/v1/chat/completions", json=body))
    (delta,) = called["choices"][0]["delta"]["tool_calls"]
    assert delta["index"] == 0
    assert delta["function"] == call["function"]
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert chat(client)["choices"][0]["message"]["content"] == written  # no tools: it is text
