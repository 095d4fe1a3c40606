"""A server in this process, over a tiny chat model whose template prints tools and puts a BOS."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n"
    "{{ tools | tojson }}<|eot_id|>{% endif %}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] %}{{ call['function'] | tojson }}{% endfor %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% if loud %}!{% endif %}{% endif %}"
)
GREEDY = {"temperature": 0, "max_tokens": 12}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="session")
def model(llama3: Callable[..., Any]) -> Any:
    """The model."""
    import alaya_jax as aj

    return aj.load(str(llama3(TEMPLATE)), dtype="float32")


@pytest.fixture(scope="module")
def opened(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Opens servers: `opened(api_key=...)` is a client of one."""
    from starlette.testclient import TestClient

    import alaya_jax as aj
    from alaya_jax.engine import Engine
    from alaya_jax.serve.app import create_app
    from alaya_jax.serve.service import Service

    clients = []

    def open(engine: Any = None, **settings: Any) -> TestClient:
        def start() -> Engine:
            budget = aj.Budget.for_pages(model, 257, indexes="64MiB")
            return Engine(aj.DB(tmp_path_factory.mktemp("served"), model, budget), slots=4)

        service = Service(engine or start, "tiny", **settings)
        client = TestClient(create_app(service), raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        service.wait()
        return client

    yield open
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def client(opened: Callable[..., Any]) -> Any:
    """A client of a server."""
    return opened()


@pytest.fixture(scope="module")
def engine(client: Any) -> Any:
    """Its engine."""
    return client.app.state.service.engine


@pytest.fixture(scope="module")
def served(client: Any) -> Any:
    """What its requests are understood against."""
    return client.app.state.service.served


def events(answer) -> list[dict[str, Any]]:
    """The data of a stream of events, which ends as OpenAI's do."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def chat(client, **body) -> dict[str, Any]:
    answer = client.post("/v1/chat/completions", json={"messages": HELLO} | GREEDY | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def complete(client, **body) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"prompt": "Once"} | GREEDY | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def expected(engine: Any, ids, **request) -> Any:
    settings = {"max_new_tokens": 12} | request
    from alaya_jax.engine import Request

    return engine.submit(Request(ids, **settings)).result()
