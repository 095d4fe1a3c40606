"""Contexts over HTTP."""

import json

import pytest

import alaya_jax as aj

from .conftest import HELLO

DOCUMENT = " ".join(f"Article {i} says that nobody is above article {i + 1}." for i in range(60))


def test_a_document_is_stored_with_progress_listed_pinned_and_deleted(client):
    with client.stream(
        "POST", "/v1/contexts", json={"document": DOCUMENT, "title": "Articles", "stream": True}
    ) as answer:
        *events, done, _ = "".join(answer.iter_text()).split("\n\n")
    assert done == "data: [DONE]"
    *progress, stored = [json.loads(event.removeprefix("data: ")) for event in events]
    assert progress
    assert [p["tokens"] for p in progress] == sorted(p["tokens"] for p in progress)
    assert all(p["of"] == stored["tokens"] for p in progress)
    assert (stored["object"], stored["title"], stored["pinned"]) == ("context", "Articles", False)
    assert stored["exact_tokens"] == stored["tokens"]
    path = f"/v1/contexts/{stored['id']}"
    assert client.get(path).json() == stored
    assert stored in client.get("/v1/contexts").json()["data"]

    assert client.patch(path, json={"pinned": True}).json()["pinned"]
    kept = client.delete(path)
    assert kept.status_code == 409
    assert "pinned" in kept.json()["error"]["message"]
    assert not client.patch(path, json={"pinned": False}).json()["pinned"]
    deleted = {"id": stored["id"], "object": "context", "deleted": True}
    assert client.delete(path).json() == deleted
    assert client.get(path).status_code == 404
    assert client.delete(path).status_code == 404


def test_what_is_stored_is_not_computed_again(client):
    engine = client.app.state.service.engine
    first = client.post("/v1/contexts", json={"document": DOCUMENT}).json()
    again = client.post("/v1/contexts", json={"document": DOCUMENT, "pinned": True}).json()
    assert again == first | {"pinned": True}
    said = client.post(
        "/v1/chat/completions",
        json={"messages": HELLO, "document": DOCUMENT, "max_tokens": 3, "temperature": 0},
    ).json()
    assert said["usage"]["prompt_tokens_details"]["cached_tokens"] == first["tokens"]
    client.patch(f"/v1/contexts/{first['id']}", json={"pinned": False})
    # Without it, the answer is the same.
    db = engine.db
    client.delete(f"/v1/contexts/{first['id']}")
    ids = db.prompt(messages=HELLO, document=DOCUMENT).ids
    alone = engine.submit(aj.Request(ids, max_new_tokens=3)).result()
    assert said["choices"][0]["message"]["content"] == alone.text


def test_a_stored_document_can_be_asked_about_by_its_id(client):
    stored = client.post("/v1/contexts", json={"document": DOCUMENT}).json()
    body = {"messages": HELLO, "max_tokens": 3, "temperature": 0}
    by_text = client.post("/v1/chat/completions", json=body | {"document": DOCUMENT}).json()
    by_id = client.post("/v1/chat/completions", json=body | {"context": stored["id"]}).json()
    assert by_id["choices"] == by_text["choices"]
    assert by_id["usage"]["prompt_tokens"] == by_text["usage"]["prompt_tokens"]
    assert by_id["usage"]["prompt_tokens_details"]["cached_tokens"] == stored["tokens"]


def test_a_context_that_is_no_beginning_is_refused(client):
    document = client.post("/v1/contexts", json={"document": DOCUMENT}).json()["id"]
    prompt = client.post("/v1/contexts", json={"prompt": "Once upon a time"}).json()["id"]
    system = [{"role": "system", "content": "Be brief."}, *HELLO]
    for body, status in (
        ({"context": prompt, "messages": HELLO}, 400),
        ({"context": document, "messages": system}, 400),
        ({"context": "nobody", "messages": HELLO}, 404),
        ({"context": document, "document": "a", "messages": HELLO}, 400),
    ):
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == status, answer.text
        assert "context" in answer.json()["error"]["message"]


def test_messages_and_prompts_can_be_stored(client):
    db = client.app.state.service.engine.db
    for body in ({"messages": HELLO}, {"prompt": "Once upon a time"}, {"prompt": [5, 6, 7]}):
        stored = client.post("/v1/contexts", json=body).json()
        (context,) = [c for c in db.contexts if c.id == stored["id"]]
        assert context.num_tokens == stored["tokens"]
    assert context.tokens.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "document"),
        ({"document": "a", "prompt": "b"}, "document"),
        ({"document": 3}, "document"),
        ({"messages": []}, "document"),
        ({"prompt": 3}, "prompt"),
        ({"document": "a", "format": "pdf"}, "format"),
        ({"document": "a" * 20_000}, None),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_cannot_be_stored_is_refused(client, body, param):
    answer = client.post("/v1/contexts", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_changes_say_what_changes(client):
    stored = client.post("/v1/contexts", json={"prompt": [9, 8]}).json()
    path = f"/v1/contexts/{stored['id']}"
    assert client.patch(path, json={}).json()["error"]["param"] == "pinned"
    assert client.patch(path, json={"pinned": 1}).json()["error"]["param"] == "pinned"
    assert client.patch(path, json={"title": "x"}).json()["error"]["param"] == "title"


def test_no_room_beside_what_runs_is_not_for_ever(opened, model, tmp_path):
    from alaya_jax.engine import Engine

    db = aj.DB(tmp_path / "db", model, aj.Budget.for_pages(model, 65, indexes="64MiB"))
    client = opened(lambda: Engine(db))
    session, _ = db.create_session([5, 6])
    with session:
        session.prefill([5, 6, 7] * 300)
        full = client.post("/v1/contexts", json={"prompt": [6, 7] * 250})
        assert full.status_code == 503
        assert int(full.headers["retry-after"]) > 0
        assert full.json()["error"]["code"] == "cache_full"
    assert client.post("/v1/contexts", json={"prompt": [6, 7] * 250}).status_code == 200
    never = client.post("/v1/contexts", json={"prompt": [6, 7] * 900})
    assert never.status_code == 400
    assert never.json()["error"]["code"] == "context_length_exceeded"
