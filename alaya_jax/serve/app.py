"""The routes."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from alaya_jax import __version__, prompts
from alaya_jax.contexts.context import Context
from alaya_jax.engine import Result, Running
from alaya_jax.errors import AlayaError, RequestError
from alaya_jax.generation import Token
from alaya_jax.serve import contexts, page
from alaya_jax.serve.answers import Answers
from alaya_jax.serve.door import Door, answer, refused
from alaya_jax.serve.fields import Body, Refusal
from alaya_jax.serve.ledger import Entry
from alaya_jax.serve.metrics import CONTENT_TYPE
from alaya_jax.serve.protocol import Asked, Served
from alaya_jax.serve.service import Service
from alaya_jax.serve.streaming import DONE, Events, merged, while_there

_log = logging.getLogger(__name__)

MOST_BYTES = 16 * 2**20
"""Of a request: several million tokens of text."""


def create_app(service: Service) -> Starlette:
    """The application of a service; its engine is made when the application starts."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await run_in_threadpool(service.close)

    routes = [
        Route("/", _page),
        Route("/health", _health),
        Route("/version", _version),
        Route("/metrics", _metrics),
        Route("/tokenize", _tokenize, methods=["POST"]),
        Route("/detokenize", _detokenize, methods=["POST"]),
        Route("/tokenizer_info", _tokenizer_info),
        Route("/v1/models", _models),
        Route("/v1/models/{name:path}", _model),
        Route("/v1/chat/completions", _chat, methods=["POST"]),
        Route("/v1/completions", _completions, methods=["POST"]),
        Route("/v1/contexts", _contexts),
        Route("/v1/contexts", _import, methods=["POST"]),
        Route("/v1/contexts/{id}", _context),
        Route("/v1/contexts/{id}", _change, methods=["PATCH"]),
        Route("/v1/contexts/{id}", _delete, methods=["DELETE"]),
        Route("/v1/requests", _requests),
        Route("/v1/requests/{id}", _request),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Door, api_key=service.api_key, hosts=service.hosts)],
        exception_handlers={
            AlayaError: refused,
            HTTPException: refused,
            Exception: refused,
        },
    )
    app.state.service = service
    return app


def _service(request: Request) -> Service:
    return request.app.state.service


async def _read(request: Request) -> bytes:
    """What a client sent.

    Raises:
      Refusal: it is more than `MOST_BYTES`, and was heard to its end, or the client would not
        hear this; or the client went away.
    """
    size, parts = 0, []
    try:
        async for part in request.stream():
            size += len(part)
            if size <= MOST_BYTES:
                parts.append(part)
    except ClientDisconnect as error:  # nobody reads this
        raise Refusal("the client went away before it had asked", status=499) from error
    if size > MOST_BYTES:
        raise Refusal(
            f"the body has {size:,} bytes, and this server reads up to {MOST_BYTES:,}",
            status=413,
        )
    return b"".join(parts)


async def _body(request: Request) -> Any:
    """The JSON of a request.

    Raises:
      Refusal: it is none. Other types are refused because a page of another site may send them
        without asking.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(f"Content-Type is {kind or 'missing'}; send application/json", status=415)
    sent = await _read(request)
    try:
        data = json.loads(sent)
        json.dumps(data, ensure_ascii=False).encode()  # or no answer could say it
        return data
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise Refusal(
            f"a text in the body has half a surrogate pair ({half!r}), which no encoding of "
            "Unicode has; send whole characters"
        ) from error
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {error}") from error


async def _page(_: Request) -> Response:
    return HTMLResponse(page.html(), headers=page.HEADERS)


async def _health(request: Request) -> Response:
    service = _service(request)
    ready = service.state == "ready"
    return JSONResponse({"status": service.state}, 200 if ready else 503)


async def _version(_: Request) -> Response:
    return JSONResponse({"version": __version__})


async def _metrics(request: Request) -> Response:
    text = await run_in_threadpool(_service(request).metrics.text)
    return Response(text, headers={"Content-Type": CONTENT_TYPE})


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(_service(request))]})


async def _model(request: Request) -> Response:
    service = _service(request)
    if request.path_params["name"] != service.name:
        raise Refusal(
            f"there is no model {request.path_params['name']!r}; this server has {service.name!r}",
            status=404,
            code="model_not_found",
        )
    return JSONResponse(_described(service))


def _described(service: Service) -> dict[str, Any]:
    model = service.engine.db.model
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "alaya_jax",
        "max_model_len": model.length_limit,
        "attention": service.attention,
    }


async def _chat(request: Request) -> Response:
    return await _generated(request, Served.chat)


async def _completions(request: Request) -> Response:
    return await _generated(request, Served.completion)


async def _generated(request: Request, understand: Callable[[Served, Any], Asked]) -> Response:
    service = _service(request)
    served = service.served
    asked = await run_in_threadpool(understand, served, await _body(request))
    id = request.state.id
    answers = Answers(asked, service.name, served.db.model.tokenizer, id)
    runs = await run_in_threadpool(service.submit, asked, id)

    def cancel() -> None:
        for run, _ in runs:
            run.cancel()

    if asked.stream is not None:
        return Events(_events(service, answers, asked, runs), cancel)
    async with while_there(request.receive, cancel):
        results = await _results(service, runs)
    return JSONResponse(answers.whole(results))


async def _results(service: Service, runs: Sequence[tuple[Running, Entry]]) -> list[Result]:
    """Waits for all; where one fails, the others are cancelled."""
    results: dict[int, Result] = {}
    async with contextlib.aclosing(_told(service, runs, tokens=False)) as told:
        async for number, what in told:
            if isinstance(what, Result):
                results[number] = what
    return [results[i] for i in range(len(runs))]


async def _told(
    service: Service, runs: Sequence[tuple[Running, Entry]], *, tokens: bool = True
) -> AsyncGenerator[tuple[int, Token | Result]]:
    """`merged`, of which the ledger hears; who is left at the end is cancelled."""
    left = dict(enumerate(runs))
    why: Exception = RequestError("the client went away")
    each = merged([run for run, _ in runs], tokens=tokens)
    try:
        async with contextlib.aclosing(each) as told:
            async for number, what in told:
                if isinstance(what, Result):
                    service.ledger.end(left.pop(number)[1], what)
                yield number, what
    except Exception as error:
        why = error
        raise
    finally:
        for run, entry in left.values():
            run.cancel()
            service.ledger.end(entry, why)


async def _events(
    service: Service, answers: Answers, asked: Asked, runs: Sequence[tuple[Running, Entry]]
) -> AsyncGenerator[Any]:
    """The events of a stream; an error is one of them, as its status has been sent."""
    results: dict[int, Result] = {}
    try:
        async with contextlib.aclosing(_told(service, runs)) as told:
            async for number, what in told:
                if isinstance(what, Result):
                    results[number] = what
                    events = answers.end(number, what)
                else:
                    events = answers.token(number, what)
                for event in events:
                    yield event
        if asked.stream is not None and asked.stream.usage:
            yield answers.usage_event([results[i] for i in range(len(runs))])
    except Exception as error:
        yield _said(error)
    yield DONE


def _said(error: Exception) -> str:
    """An error as the data of an event."""
    if not isinstance(error, AlayaError):
        _log.error("a stream failed", exc_info=error)
    return bytes(answer(error).body).decode()


async def _tokenize(request: Request) -> Response:
    served = _service(request).served
    body = Body(await _body(request))
    served.check_model(body)
    named = body.take("return_token_strs", bool, False)

    def read() -> np.ndarray:
        if body.has("messages"):
            return served.conversation(body)[0]
        pairs = served.texts(body)
        if len(pairs) != 1:
            raise Refusal("prompt: give one text", "prompt")
        return pairs[0][1]

    ids = await run_in_threadpool(read)
    body.done()
    model = served.db.model
    said = {"count": len(ids), "max_model_len": model.length_limit, "tokens": ids.tolist()}
    if named:
        said["token_strs"] = [prompts.tokenizer_of(model).decode([i]) for i in said["tokens"]]
    return JSONResponse(said)


async def _detokenize(request: Request) -> Response:
    served = _service(request).served
    body = Body(await _body(request))
    served.check_model(body)
    ids = body.take("tokens", list, [])
    body.done()
    model = served.db.model
    text = prompts.tokenizer_of(model).decode(model.check_tokens(ids)) if ids else ""
    return JSONResponse({"prompt": text})


async def _tokenizer_info(request: Request) -> Response:
    return JSONResponse(prompts.tokenizer_of(_service(request).served.db.model).to_config())


async def _contexts(request: Request) -> Response:
    served = _service(request).served
    found = await run_in_threadpool(lambda: [contexts.described(c) for c in served.db.contexts])
    return JSONResponse({"object": "list", "data": found})


async def _import(request: Request) -> Response:
    service = _service(request)
    served = service.served
    wanted = await run_in_threadpool(contexts.Import, served, await _body(request))
    if wanted.stream:
        return Events(_progress(service, wanted), wanted.cancel)
    async with while_there(request.receive, wanted.cancel), _turn(service, wanted):
        context = await run_in_threadpool(wanted.run)
    return JSONResponse(contexts.described(context))


@contextlib.asynccontextmanager
async def _turn(service: Service, wanted: contexts.Import) -> AsyncIterator[None]:
    """Waits for other imports; one at a time is enough for a device."""
    service.imports.add(wanted)
    try:
        async with service.importing:
            yield
    finally:
        service.imports.discard(wanted)


async def _progress(service: Service, wanted: contexts.Import) -> AsyncGenerator[Any]:
    try:
        async with _turn(service, wanted), contextlib.aclosing(contexts.events(wanted)) as events:
            async for event in events:
                yield event
    except Exception as error:
        yield _said(error)
    yield DONE


async def _found(request: Request) -> tuple[Served, Context]:
    served = _service(request).served
    return served, await run_in_threadpool(served.stored, request.path_params["id"])


async def _context(request: Request) -> Response:
    _, context = await _found(request)
    return JSONResponse(contexts.described(context))


async def _change(request: Request) -> Response:
    _, context = await _found(request)
    body = Body(await _body(request))
    pinned = body.take("pinned", bool)
    body.done()
    if pinned is None:
        raise Refusal("say pinned: true, or false", "pinned")
    await run_in_threadpool(context.pin if pinned else context.unpin)
    return JSONResponse(contexts.described(context))


async def _delete(request: Request) -> Response:
    served, context = await _found(request)
    await run_in_threadpool(served.db.remove, context)
    return JSONResponse({"id": context.id, "object": "context", "deleted": True})


async def _requests(request: Request) -> Response:
    service = _service(request)
    said = [entry.to_dict() for entry in service.ledger.entries()]
    stats = dataclasses.asdict(await run_in_threadpool(service.engine.stats))
    return JSONResponse({"object": "list", "engine": stats, "data": said})


async def _request(request: Request) -> Response:
    id = request.path_params["id"].removeprefix("chatcmpl-").removeprefix("cmpl-")
    said = [entry.to_dict() for entry in _service(request).ledger.entries(id)]
    if not said:
        raise Refusal(f"no request {id!r} runs, or is remembered", "id", status=404)
    return JSONResponse({"object": "list", "data": said})
