"""Several replicas of `alaya serve` behind one address, on one machine or many, by Ray Serve.

    pip install "alaya_jax[serve,ray]"
    python examples/serve_ray.py MODEL --db PATH --replicas 2 [--gpus 1] [--port 8000]

Each replica is a process with the server's own application, an engine and the accelerators that Ray
gives it. A request goes to the replica that has most of its prompt stored, and among equals to the
one with least to do. Where replicas share a database (a folder of one machine), or
fill theirs from one store (`--remote`), what one has read the others find.

A replica that dies is started again by Ray. A request that it had not begun to answer goes to
another; a stream that had begun ends with an error event that says so.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import typer
from ray import serve
from ray.exceptions import RayError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

TRIES = 3
"""Replicas that a request is handed to, one after another, while none begins to answer."""
PATIENCE = 2.0
"""Seconds in which a replica says what it has: one that died says nothing until it is back."""


@serve.deployment(health_check_period_s=2, max_ongoing_requests=1024)
class Replica:
    """An engine, and the application of `alaya serve` around it.

    Args:
      model: name or path.
      settings: of `alaya_jax.DB`, and `attention`, in words.
    """

    def __init__(self, model: str, settings: dict[str, Any]):
        from alaya_jax.serve.app import create_app
        from alaya_jax.serve.service import Service

        attention = settings.pop("attention", "full")

        def start() -> Any:
            import alaya_jax as aj

            return aj.Engine(aj.DB(model=aj.load(model, progress=False), **settings))

        self._service = Service(start, model, attention=attention)
        self._app = create_app(self._service)
        self._service.start()
        self._service.wait()
        if self._service.failure is not None:
            raise self._service.failure

    def check_health(self) -> None:
        """Ray starts a replica anew whose engine has ended."""
        if self._service.state == "failed":
            raise RuntimeError(str(self._service.failure))

    def stored(self, path: str, body: bytes) -> int:
        """Tokens of a request's prompts that need not be computed here."""
        served = self._service.served
        understood = {"/v1/chat/completions": served.chat, "/v1/completions": served.completion}
        try:
            asked = understood[path](json.loads(body))
        except Exception:  # whoever answers it says what is wrong with it
            return 0
        return sum(served.db.catalogue.match(row)[1] for row in asked.prompts)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """Runs the application for one request; yields the messages that it sends."""
        sent: asyncio.Queue[Any] = asyncio.Queue()
        gone = asyncio.Event()
        asked = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            if (message := next(asked, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, sent.put)
            finally:
                await sent.put(None)

        running = asyncio.create_task(run())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await running
        finally:  # also when the client went away
            gone.set()


@serve.deployment(max_ongoing_requests=4096)
class Front:
    """What clients reach: hands each request to a replica.

    Args:
      replicas: handles, of a deployment of one replica each, so that it can be chosen.
    """

    def __init__(self, *replicas: Any):
        self._replicas = replicas
        self._running = [0] * len(replicas)

    async def __call__(self, request: Request) -> Response:
        """Hands a request on, and its answer back."""
        body = await request.body()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": request.url.scheme,
            "path": request.url.path,
            "raw_path": request.url.path.encode(),
            "root_path": "",
            "query_string": request.url.query.encode(),
            "headers": request.headers.raw,
            "server": ("127.0.0.1", 80),
            "client": None,
        }
        order = await self._order(request.url.path, body)
        for i in order[:TRIES]:
            messages = self._replicas[i].options(stream=True).answer.remote(scope, body)
            self._running[i] += 1
            try:
                begun = await anext(messages)
            except RayError:  # it died; none of its words was heard
                self._running[i] -= 1
                continue
            except BaseException:
                self._running[i] -= 1
                raise
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in begun["headers"]}
            headers.pop("x-request-id", None)  # Ray's proxy says it as well
            content = self._rest(i, messages, headers.get("content-type", ""))
            return StreamingResponse(content, begun["status"], headers | {"x-replica": str(i)})
        text = "no replica answers; Ray starts them again: come back in a few seconds"
        error = {"message": text, "type": "server_error", "code": "no_replica", "param": None}
        return JSONResponse({"error": error}, 503, {"Retry-After": "5"})

    async def _rest(self, i: int, messages: Any, kind: str) -> AsyncIterator[bytes]:
        """The body of an answer that has begun."""
        try:
            async for message in messages:
                yield message.get("body", b"")
        except RayError as error:
            if not kind.startswith("text/event-stream"):
                raise  # the connection breaks off: the length that was promised is not there
            text = f"replica {i} ended in the middle of its answer: {type(error).__name__}"
            said = {"message": text, "type": "server_error", "code": "replica_lost", "param": None}
            yield f"data: {json.dumps({'error': said})}\n\n".encode()
        finally:
            self._running[i] -= 1
            messages.cancel()

    async def _order(self, path: str, body: bytes) -> list[int]:
        """Replicas, the best first: most of the prompt stored, then least to do."""
        stored = [0] * len(self._replicas)
        if path in ("/v1/chat/completions", "/v1/completions"):
            stored = await asyncio.gather(*(self._stored(r, path, body) for r in self._replicas))
        return sorted(range(len(stored)), key=lambda i: (-stored[i], self._running[i]))

    async def _stored(self, replica: Any, path: str, body: bytes) -> int:
        """What a replica has of a request; -1: it does not answer, so it comes last."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await replica.stored.remote(path, body)
        except (RayError, TimeoutError):
            return -1


def application(model: str, replicas: int, settings: dict[str, Any], actor: dict[str, Any]) -> Any:
    """What `ray.serve.run` takes.

    Args:
      model: name or path, the same on every machine.
      replicas: how many.
      settings: see `Replica`.
      actor: `ray_actor_options` of each: num_cpus, num_gpus, resources, runtime_env.
    """
    each = [
        Replica.options(name=f"replica-{i}", ray_actor_options=actor).bind(model, dict(settings))
        for i in range(replicas)
    ]
    return Front.bind(*each)


def main(
    model: Annotated[str, typer.Argument(help="Name or path, the same on every machine.")],
    db: Annotated[str, typer.Option(help="The folder of the database, on each machine.")],
    remote: Annotated[str, typer.Option(help="A store that databases share, s3://...")] = "",
    replicas: Annotated[int, typer.Option(min=1, help="Processes with an engine each.")] = 2,
    cpus: Annotated[float, typer.Option(help="Of each replica.")] = 1,
    gpus: Annotated[float, typer.Option(help="Of each replica.")] = 0,
    host: Annotated[str, typer.Option(help="0.0.0.0: reachable from elsewhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Of the one address.")] = 8000,
) -> None:
    """Serves until Ctrl-C."""
    settings: dict[str, Any] = {"path": db}
    if remote:
        settings["remote"] = remote
    actor = {"num_cpus": cpus, "num_gpus": gpus}
    serve.start(http_options={"host": host, "port": port})
    serve.run(application(model, replicas, settings, actor), blocking=True)


if __name__ == "__main__":
    typer.run(main)
