"""Requests over HTTP, against an engine in this process."""

import threading
import time
from typing import Any

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.engine import Engine, Request
from alaya_jax.errors import AlayaError, QueueFullError

from .conftest import GREEDY, HELLO, chat, complete, events, expected


def test_a_chat_is_what_the_engine_says(client, engine):
    model = engine.db.model
    ids = model.encode(model.chat.render(HELLO))
    alone, said = expected(engine, ids), chat(client)
    assert said["object"] == "chat.completion"
    assert said["id"].startswith("chatcmpl-")
    (choice,) = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": alone.text}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    usage = said["usage"]
    assert usage["prompt_tokens"] == len(ids)
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == len(ids) + 12
    assert usage["attention"] == "full"
    assert usage["keys_read"] == pytest.approx(alone.keys_read)


def test_a_completion_is_what_the_engine_says(client, engine):
    said = complete(client)
    assert said["object"] == "text_completion"
    assert said["id"].startswith("cmpl-")
    alone = expected(engine, engine.db.model.encode("Once"))
    assert said["choices"][0]["text"] == alone.text


def test_a_stream_is_the_same_text(client):
    whole = chat(client, n=2, seed=4, temperature=0.8)
    body = {"messages": HELLO} | GREEDY | {"n": 2, "seed": 4, "temperature": 0.8, "stream": True}
    body["stream_options"] = {"include_usage": True}
    *chunks, last = events(client.post("/v1/chat/completions", json=body))
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {}
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        text = "".join(c["delta"].get("content", "") for c in mine)
        assert text == choice["message"]["content"]
    assert len({c["id"] for c in chunks}) == 1
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}


def test_a_stream_of_a_completion(client):
    whole = complete(client, logprobs=2)
    body = {"prompt": "Once", "logprobs": 2, "stream": True} | GREEDY
    body["stream_options"] = {"continuous_usage_stats": True}
    chunks = events(client.post("/v1/completions", json=body))
    choices = [c["choices"][0] for c in chunks]
    assert "".join(c["text"] for c in choices) == whole["choices"][0]["text"]
    parts = [c["logprobs"] for c in choices if c["logprobs"]]
    for name, values in whole["choices"][0]["logprobs"].items():
        assert [v for part in parts for v in part[name]] == values, name
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_several_texts_and_prompts_keep_their_order(client, engine):
    settings = {"temperature": 0.9, "seed": 5}
    said = complete(client, prompt=["Once", "Twice"], n=2, **settings)
    assert [c["index"] for c in said["choices"]] == [0, 1, 2, 3]
    alone = [
        expected(engine, p, sampling=aj.Sampling(temperature=0.9, seed=seed)).text
        for p in ("Once", "Twice")
        for seed in (5, 6)
    ]
    assert [c["text"] for c in said["choices"]] == alone
    assert len(set(alone)) == 4
    assert said["usage"]["completion_tokens"] == 48
    ids = [len(engine.db.model.encode(p)) for p in ("Once", "Twice")]
    assert said["usage"]["prompt_tokens"] == sum(ids)


def test_stop_strings_and_ids_end_a_text(client):
    text = chat(client, max_tokens=12)["choices"][0]["message"]["content"]
    stop = text[4:7]
    (choice,) = chat(client, stop=stop)["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == text[: text.index(stop)]
    scored = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    ids = client.post("/tokenize", json={"prompt": "x", "add_special_tokens": False}).json()
    assert ids["count"] == 1
    first = complete(client, max_tokens=1)["choices"][0]["text"]
    forced = complete(client, logit_bias={str(ids["tokens"][0]): 1000}, max_tokens=3)
    assert forced["choices"][0]["text"] == "xxx" != first
    ended = complete(client, logit_bias={str(ids["tokens"][0]): 1000}, stop_token_ids=ids["tokens"])
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("", "stop")
    assert len(scored) == 12


def test_a_plan_for_each_request(client):
    prompt = "Once upon a time there was a king who had three daughters. " * 12
    body = {"prompt": prompt, "max_tokens": 4}
    full = complete(client, **body)["usage"]
    window = complete(client, attention="window:4,32", **body)["usage"]
    assert window["attention"] == "window:4,32"
    assert window["keys_read"] < 64 < full["keys_read"]


def test_a_server_has_a_plan_for_requests_that_name_none(opened):
    other = opened(attention="window:4,32")
    assert chat(other)["usage"]["attention"] == "window:4,32"
    assert chat(other, attention="full")["usage"]["attention"] == "full"


def test_health_tells_ready_from_starting(opened):
    from starlette.testclient import TestClient

    from alaya_jax.serve.app import create_app
    from alaya_jax.serve.service import Service

    go, real = threading.Event(), opened().app.state.service.engine

    def start() -> Engine:
        go.wait(60)
        return Engine(real.db, slots=1)

    service = Service(start, "tiny")
    with TestClient(create_app(service)) as client:
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "starting"})
        early = client.post("/v1/chat/completions", json={"messages": HELLO})
        assert early.status_code == 503
        assert early.json()["error"]["code"] == "starting"
        assert int(early.headers["retry-after"]) > 0
        assert client.get("/metrics").status_code == 200
        go.set()
        service.wait()
        health = client.get("/health")
        assert (health.status_code, health.json()) == (200, {"status": "ready"})
        service.stopping = True
        assert client.get("/health").json() == {"status": "stopping"}


def test_a_server_that_cannot_start_says_so():
    from starlette.testclient import TestClient

    from alaya_jax.serve.app import create_app
    from alaya_jax.serve.service import Service

    def start() -> Engine:
        raise AlayaError("no such model")

    service = Service(start, "tiny")
    with TestClient(create_app(service)) as client:
        service.wait()
        assert client.get("/health").json() == {"status": "failed"}
    assert str(service.failure) == "no such model"


def test_models(client, engine):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert model["max_model_len"] == engine.db.model.length_limit
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/org/other").status_code == 404


def test_tokenize_and_detokenize(client, engine):
    model = engine.db.model
    said = client.post("/tokenize", json={"prompt": "Once upon", "return_token_strs": True}).json()
    assert said["tokens"] == model.encode("Once upon").tolist()
    assert said["count"] == len(said["tokens"]) == len(said["token_strs"])
    text = client.post("/detokenize", json={"tokens": said["tokens"][1:]}).json()
    assert text == {"prompt": "Once upon"}
    chat = client.post("/tokenize", json={"messages": HELLO}).json()
    assert chat["tokens"] == model.encode(model.chat.render(HELLO)).tolist()
    assert client.post("/detokenize", json={"tokens": [10**8]}).status_code == 400
    assert client.post("/tokenize", json={"prompt": "a", "n": 1}).status_code == 400
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|eot_id|>"
    assert "chat_template" in info


def test_a_request_is_remembered(client):
    said = client.post(
        "/v1/completions",
        json={"prompt": "a", "user": "me"} | GREEDY,
        headers={"X-Request-Id": "mine-2"},
    ).json()
    assert said["id"] == "cmpl-mine-2"
    (entry,) = client.get("/v1/requests/cmpl-mine-2").json()["data"]
    assert (entry["user"], entry["state"], entry["attention"]) == ("me", "finished", "full")
    assert entry["completion_tokens"] == 12
    assert entry["keys_read"] > 0
    assert client.get("/v1/requests/nobody").status_code == 404
    every = client.get("/v1/requests").json()
    assert every["data"][0] == entry
    assert every["engine"]["running"] == 0


def test_an_engine_that_fails_is_an_error_of_the_server(client, engine, monkeypatch):
    def fails(request: Request, on_token: Any = None) -> Any:
        raise AlayaError("the logits are not finite")

    monkeypatch.setattr(engine, "submit", fails)
    answer = client.post("/v1/chat/completions", json={"messages": HELLO})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"


def test_of_a_request_that_is_not_taken_no_part_goes_on(client, engine, monkeypatch):
    submit, taken = engine.submit, []

    def full(*args: Any, **options: Any) -> Any:
        if taken:
            raise QueueFullError("as many wait as may")
        taken.append(submit(*args, **options))
        return taken[0]

    monkeypatch.setattr(engine, "submit", full)
    body = {"messages": HELLO, "n": 2, "max_tokens": 3000, "ignore_eos": True}
    assert client.post("/v1/chat/completions", json=body).status_code == 429
    assert taken[0].result(60).finish_reason == "cancelled"


def test_when_the_queue_is_full_one_has_to_come_again(opened, model, tmp_path):
    db = aj.DB(tmp_path / "db", model, aj.Budget.for_pages(model, 65, indexes="64MiB"))
    client = opened(lambda: Engine(db, slots=1, waiting=2))
    engine, answers = client.app.state.service.engine, []
    body = {"messages": HELLO, "max_tokens": 900, "ignore_eos": True, "temperature": 0}

    def ask(n: int) -> None:
        answers.append(client.post("/v1/chat/completions", json=body | {"n": n}))

    threads = [threading.Thread(target=ask, args=[n]) for n in (1, 2)]
    for thread, ready in zip(threads, ("running", "waiting"), strict=True):
        thread.start()
        deadline = time.monotonic() + 60
        while not getattr(engine.stats(), ready) and time.monotonic() < deadline:
            time.sleep(0.005)
    refused = client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.json()["error"]["code"] == "queue_full"
    for thread in threads:
        thread.join()
    assert [(a.status_code, len(a.json()["choices"])) for a in answers] == [(200, 1), (200, 2)]
    assert client.post("/v1/chat/completions", json=body | {"max_tokens": 1}).status_code == 200
    assert "alaya_admission_rejections_total 1.0" in client.get("/metrics").text


def test_a_stored_context_is_reused(client, engine):
    document = "We the People of the United States, in Order to form a more perfect Union. " * 4
    stored = client.post("/v1/contexts", json={"document": document, "title": "people"}).json()
    said = chat(client, document=document)
    cached = said["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == stored["tokens"]
    body = {"messages": HELLO, "document": document} | GREEDY
    cold = np.asarray(engine.db.prompt(messages=HELLO, document=document).ids)
    assert said["usage"]["prompt_tokens"] == len(cold)
    assert said["choices"] == client.post("/v1/chat/completions", json=body).json()["choices"]
