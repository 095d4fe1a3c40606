"""A server in this process, over a tiny chat model whose template prints tools and puts a BOS."""

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
