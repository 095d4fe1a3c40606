"""Clients that go away, and errors in streams; the application is called as a server calls it."""

import asyncio
import json
import time
from typing import Any

import pytest

from alaya_jax.errors import AlayaError
from alaya_jax.serve.contexts import Import

from .conftest import HELLO

LONG = {"messages": HELLO, "max_tokens": 3000, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def service(client):
    return client.app.state.service


def leave(
    app, path: str, body: dict[str, Any], after: int, *, breaks: bool = False, wait: float = 0.5
) -> list[Any]:
    """Asks, and goes away: after so many messages of the answer or, at 0, after a while.

    Args:
      wait: that while, seconds.
      breaks: the way back breaks, and nobody says so before something is sent.
    """

    async def run() -> list[Any]:
        asked, gone, sent = False, asyncio.Event(), []

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": json.dumps(body).encode()}
            await (asyncio.Event() if breaks else gone).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if breaks and gone.is_set():
                raise OSError("broken pipe")
            sent.append(message)
            if after and len(sent) >= after:
                gone.set()

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        if not after:
            asyncio.get_running_loop().call_later(wait, gone.set)
        await asyncio.wait_for(app(scope, receive, send), 60)
        return sent

    return asyncio.run(run())


def settled(service) -> None:
    """Waits until nothing runs or waits; where programs are compiled, that takes a while."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        stats = service.engine.stats()
        if not stats.running and not stats.waiting:
            break
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("stream", "after", "breaks"),
    [(True, 6, False), (True, 6, True), (True, 0, False), (False, 0, False)],
)
def test_who_goes_away_leaves_no_pages_behind(client, service, stream, after, breaks):
    settled(service)
    pool = service.engine.db.pool
    before = pool.free_tokens
    leave(
        client.app, "/v1/chat/completions", LONG | {"stream": stream, "n": 2}, after, breaks=breaks
    )
    settled(service)
    stats = service.engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert pool.free_tokens == before
    assert service.ledger.running == []
    first, second = service.ledger.entries()[:2]
    for entry in (first, second):
        assert entry.tokens < 3000
        assert entry.error or entry.result.finish_reason == "cancelled"
    assert client.post("/v1/chat/completions", json=LONG | {"max_tokens": 2}).status_code == 200


def test_who_goes_away_while_asking_is_no_error(client):
    async def run() -> list[Any]:
        sent = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
        await client.app(
            scope | {"headers": [(b"content-type", b"application/json")]}, receive, send
        )
        return sent

    assert asyncio.run(run())[0]["status"] == 499


def test_an_import_that_nobody_waits_for_ends_and_stores_nothing(client, service):
    document = " ".join(f"Line {i} says what nobody said before." for i in range(160))
    ids = service.served.ids(document).tolist()
    wanted = Import(service.served, {"prompt": ids})
    wanted.cancel()
    with pytest.raises(AlayaError, match="went away"):
        wanted.run()
    wanted = Import(service.served, {"prompt": ids})
    with pytest.raises(AlayaError, match="went away"):
        wanted.run(wanted.cancel)  # behind the first chunk
    assert 0 < wanted.done < len(ids)
    settled(service)
    known = [context.num_tokens for context in service.engine.db.contexts]
    assert len(ids) not in known
    # So it is when the client goes, whether it hears of the progress or waits for the end.
    for stream in (True, False):
        before = service.engine.db.pool.free_tokens
        leave(client.app, "/v1/contexts", {"prompt": ids, "stream": stream}, 0, wait=0.0)
        assert service.imports == set()
        assert service.engine.db.pool.free_tokens == before
    assert known == [context.num_tokens for context in service.engine.db.contexts]


def test_an_error_behind_the_first_event_is_an_event(client, service, monkeypatch):
    class Fails:
        def cancel(self) -> None:
            pass

        async def __aiter__(self):
            raise RuntimeError("out of luck")
            yield

    monkeypatch.setattr(service.engine, "submit", lambda *_, **__: Fails())
    answer = client.post("/v1/chat/completions", json=LONG | {"stream": True})
    assert answer.status_code == 200
    first, last, _ = answer.text.split("\n\n")
    error = json.loads(first.removeprefix("data: "))["error"]
    assert "out of luck" in error["message"]
    assert error["type"] == "server_error"
    assert last == "data: [DONE]"
    assert service.ledger.entries()[0].error == "out of luck"
    assert service.ledger.running == []
