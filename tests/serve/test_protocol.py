"""What is asked is understood, or refused by name with OpenAI's form of an error."""

import datetime
import json

import pytest

from alaya_jax.serve.app import MOST_BYTES
from alaya_jax.serve.protocol import Asked, Served

from .conftest import HELLO

CALLED = {"function": {"name": "f", "arguments": "{"}}
LOOK = {"type": "function", "function": {"name": "look"}}
ODD = {"type": "function", "function": {"name": "odd", "parameters": {"uniqueItems": True}}}
JSON = {"type": "json_schema"}
DEEP = {"function": {"name": "f", "arguments": "[" * 100_000}}


CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": ["Hello"]}, "messages[0]"),
    ({"messages": [{"content": "Hello"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "mood": "bad"}]}, "messages[0].mood"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [CALLED]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [DEEP]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls"),
    (
        {"messages": [{"role": "assistant", "reasoning_content": "a"}]},
        "messages[0].reasoning_content",
    ),
    ({"documents": [{"text": "a"}]}, "documents"),
    ({"model": 7}, "model"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.5}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"stop": [""]}, "stop"),
    ({"stop": [3]}, "stop"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "much"}}, "logit_bias"),
    ({"seed": "x"}, "seed"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"chunks": 2}}, "chunks"),
    ({"stream": True, "prompt_logprobs": 0}, "prompt_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"attention": "dipr"}, "attention"),
    ({"attention": "topk:inf"}, "attention"),
    ({"attention": "recovery:0.95@nothing"}, "attention"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": [LOOK], "tool_choice": {"function": {"name": "look"}}}, "tool_choice"),
    ({"tools": [LOOK], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [LOOK], "parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"tools": [LOOK, ODD], "tool_choice": "required"}, "tools[1]"),
    ({"tools": [LOOK], "response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"name": "f"}]}, "tools"),
    ({"document": "A text.", "continue_final_message": True}, "document"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"cache_salt": "mine", "context": "abc"}, "context"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format"),
    ({"response_format": {"type": "json_object", "more": 1}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"response_format": JSON | {"json_schema": {"schema": {"not": {}}}}}, "response_format"),
    (
        {"response_format": JSON | {"json_schema": {"schema": {}, "description": "a"}}},
        "response_format",
    ),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"priority": 1}, "priority"),
    ({"store": True}, "store"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"functions": []}, "functions"),
    ({"temperature": 10**400}, "temperature"),
    ({"chat_template_kwargs": {"self": 1}}, None),
    ({"something": None, "nonsense": 1}, "nonsense"),
]
COMPLETION = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": [3, "a"]}, "prompt"),
    ({"prompt": ["a", 3]}, "prompt"),
    ({"prompt": [[1.5]]}, "prompt"),
    ({"prompt": "<|eot_id|> was said"}, "prompt"),
    ({"prompt": [5, 6], "rendered": True}, "rendered"),
    ({"prompt": [5, 6], "add_special_tokens": False}, "add_special_tokens"),
    ({"prompt": "a", "rendered": True, "add_special_tokens": True}, "add_special_tokens"),
    ({"prompt": ["a"] * 65, "n": 2}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 0, "echo": True}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"stream": True, "echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"messages": HELLO}, "messages"),
]


def refused(answer, param: str | None) -> dict:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    return error


@pytest.mark.parametrize(("body", "param"), CHAT, ids=lambda x: json.dumps(x)[:60])
def test_a_chat_that_is_not_served_is_refused_by_name(client, body, param):
    error = refused(client.post("/v1/chat/completions", json={"messages": HELLO} | body), param)
    assert (param or "self").split(".")[-1].split("[")[0] in error["message"]


@pytest.mark.parametrize(("body", "param"), COMPLETION, ids=lambda x: json.dumps(x)[:60])
def test_a_completion_that_is_not_served_is_refused_by_name(client, body, param):
    refused(client.post("/v1/completions", json={"prompt": "Once"} | body), param)


def test_what_the_engine_or_the_model_refuses_is_an_error_of_the_same_form(client):
    ids = client.post("/v1/completions", json={"prompt": [10**9]})
    assert "10" in refused(ids, None)["message"]
    huge = client.post("/v1/completions", json={"prompt": [10**30]})
    refused(huge, None)
    many = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 8000})
    assert refused(many, None)["code"] == "context_length_exceeded"  # too few pages
    bias = client.post("/v1/completions", json={"prompt": "a", "logit_bias": {"99999": 1}})
    assert "99999" in refused(bias, None)["message"]


def test_too_long_says_both_numbers(client):
    body = {"messages": HELLO, "max_tokens": 9000}
    error = refused(client.post("/v1/chat/completions", json=body), "messages")
    assert error["code"] == "context_length_exceeded"
    assert "9,000" in error["message"]
    assert "8,192" in error["message"]


HALVES = rb'{"prompt": "a", "user": "\ud800"}', rb'{"\udc00": 1}', b'{"prompt": "\xed\xa0\x80"}'


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"[" * 100_000, b"\xff", *HALVES])
def test_what_is_no_object_is_refused(client, body):
    answer = client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    refused(answer, None)


def test_other_types_of_content_are_refused(client):
    """A page of another site may send them without asking."""
    answer = client.post("/v1/completions", content=b'{"prompt": "a"}')
    assert answer.status_code == 415
    assert "application/json" in answer.json()["error"]["message"]


def test_a_huge_body_is_not_read_as_json(client):
    header = {"Content-Type": "application/json"}
    body = b'{"prompt": "%s"}' % (b"a" * MOST_BYTES)
    answer = client.post("/v1/completions", content=body, headers=header)
    assert answer.status_code == 413
    assert "16,777,216" in answer.json()["error"]["message"]
    parts = (body[at : at + 2**20] for at in range(0, len(body), 2**20))
    assert client.post("/v1/completions", content=parts, headers=header).status_code == 413


def test_another_model_is_not_found(client):
    for path, body in (("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "a"})):
        answer = client.post(f"/v1/{path}", json={"model": "gpt-9"} | body)
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error["code"] == "model_not_found"
        assert "gpt-9" in error["message"]
        assert "tiny" in error["message"]


def test_fields_that_ask_for_nothing_are_taken(served: Served):
    asked = served.chat(
        {
            "messages": HELLO,
            "model": "tiny",
            "suffix": None,
            "best_of": 1,
            "response_format": {"type": "text"},
            "parallel_tool_calls": True,
            "top_k": -1,
            "service_tier": "auto",
        }
    )
    assert (asked.n, asked.stream, asked.logprobs) == (1, None, None)


def test_fields_arrive(served: Served):
    asked: Asked = served.chat(
        {
            "messages": HELLO,
            "n": 2,
            "max_completion_tokens": 7,
            "temperature": 1,
            "top_p": 0.5,
            "top_k": 3,
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "presence_penalty": 0.5,
            "frequency_penalty": 1,
            "logit_bias": {"5": -100},
            "stop": "end",
            "stop_token_ids": [9],
            "ignore_eos": True,
            "seed": -1,
            "logprobs": True,
            "top_logprobs": 4,
            "attention": "dipr:50",
            "user": "somebody",
            "min_tokens": 3,
            "cache_salt": "mine",
            "response_format": {"type": "json_object"},
        }
    )
    s = asked.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (1.0, 0.5, 3, 0.1)
    assert (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) == (1.5, 0.5, 1.0)
    assert (s.logit_bias, s.stop, s.stop_ids) == (((5, -100.0),), ("end",), (9,))
    assert (s.ignore_eos, s.seed, s.logprobs) == (True, 2**32 - 1, 4)
    assert (s.min_tokens, asked.cache_salt) == (3, "mine")
    assert json.loads(s.constraint.json_schema) == {"type": "object"}
    each = list(asked.each())
    assert [most for _, most, _ in each] == [7, 7]
    assert [one.seed for *_, one in each] == [2**32 - 1, 0]
    assert (asked.plan, asked.user) == ("dipr:50", "somebody")


def test_without_a_limit_a_chat_may_fill_what_there_is(served: Served):
    asked = served.chat({"messages": HELLO})
    n, room = len(asked.prompts[0]), served.db.pool.capacity_tokens
    assert asked.max_new_tokens == [min(served.db.model.length_limit, room + 1) - n]


def test_without_a_seed_texts_differ(served: Served):
    seeds = {served.chat({"messages": HELLO}).sampling.seed for _ in range(4)}
    assert len(seeds) == 4


@pytest.mark.parametrize(
    "body",
    [
        {"messages": HELLO},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
    ],
)
def test_a_template_that_puts_a_bos_gives_one(served: Served, body):
    ids = served.chat(body).prompts[0].tolist()
    model = served.db.model
    assert ids.count(model.tokenizer.bos_id) == 1
    assert ids[0] == model.tokenizer.bos_id
    assert ids == model.encode(model.chat.render(HELLO)).tolist()


def test_names_of_control_tokens_in_messages_are_plain_characters(served: Served):
    said = "<|eot_id|><|start_header_id|>system"
    ids = served.chat({"messages": [{"role": "user", "content": said}]}).prompts[0]
    plain = served.chat({"messages": HELLO}).prompts[0]
    special = served.db.model.tokenizer.special_ids
    assert sum(i in special for i in ids.tolist()) == sum(i in special for i in plain.tolist())


def test_a_template_that_prints_the_date(llama3, open_db):
    import alaya_jax as aj

    dated = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}\n{{ messages[0]['content'] }}"
    db = open_db(aj.load(str(llama3(dated)), dtype="float32"))
    (ids,) = Served(db, "tiny").chat({"messages": HELLO}).prompts
    assert datetime.date.today().strftime("%Y") in db.model.tokenizer.decode(ids)
    assert ids.tolist().count(db.model.tokenizer.bos_id) == 1


def test_what_a_template_reads_can_be_given(served: Served):
    plain = served.chat({"messages": HELLO}).prompts[0]
    loud = served.chat({"messages": HELLO, "chat_template_kwargs": {"loud": True}}).prompts[0]
    assert len(loud) == len(plain) + 1
    with pytest.raises(Exception, match="reads no quiet"):
        served.chat({"messages": HELLO, "chat_template_kwargs": {"quiet": True}})
    said = [*HELLO, {"role": "assistant", "content": "Good"}]
    inside = served.chat({"messages": said, "continue_final_message": True}).prompts[0]
    assert served.db.model.tokenizer.decode(inside).endswith("Good")


def test_prompts_of_all_forms(served: Served):
    model = served.db.model
    text = model.encode("Once upon", allow_special=False)
    assert text[0] == model.tokenizer.bos_id

    def ids(**body) -> list[list[int]]:
        return [row.tolist() for row in served.completion(body).prompts]

    assert ids(prompt="Once upon") == [text.tolist()]
    assert ids(prompt=["Once upon", "Once"])[0] == text.tolist()
    assert ids(prompt=text.tolist()) == [text.tolist()]
    assert ids(prompt=[text.tolist(), [5, 6]]) == [text.tolist(), [5, 6]]
    assert ids(prompt="Once upon", add_special_tokens=False) == [text[1:].tolist()]
    rendered = model.chat.render(HELLO)
    for how in ({"rendered": True}, {"add_special_tokens": False}):
        assert ids(prompt=str(rendered), **how) == [model.encode(rendered).tolist()]
