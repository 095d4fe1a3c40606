"""`alaya serve`: an OpenAI-compatible server."""

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alaya_jax.cli import options
from alaya_jax.cli.terminal import note
from alaya_jax.errors import RequestError

if TYPE_CHECKING:
    from alaya_jax.engine import Engine
    from alaya_jax.serve.service import Service


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=options.MODEL_HELP)] = options.MODEL,
    quantize: options.Quantize = None,
    rope: options.Rope = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="0.0.0.0: reachable from other machines.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="0: any that is free.")
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The model's name to clients.", show_default="as it is given here"
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="ALAYA_API_KEY",
            help="Serve only who sends it: Authorization: Bearer KEY.",
            show_default="none is asked for",
        ),
    ] = None,
    attention: options.Attention = "full",
    db: options.Database = None,
    namespace: Annotated[
        str, typer.Option(metavar="NAME", help="Find only contexts that were stored under it.")
    ] = "",
    store_dtype: options.StoreDtype = None,
    slots: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests that are decoded at once.")
    ] = 16,
    chunk: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of prompts that are read in one step.")
    ] = 512,
    waiting: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests that may wait; more are refused.")
    ] = 1024,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for keys and values of all requests.")
    ] = "2GiB",
    host_memory: options.HostMemory = None,
    warmup: Annotated[
        bool,
        typer.Option(
            "--warmup", help="Compile at the start what requests need, before it is ready."
        ),
    ] = False,
) -> None:
    r"""Serve a model to OpenAI's clients.

    Many requests run at once, each from the longest beginning that is stored in the database.
    Anything that speaks OpenAI's API can ask; a page for people is at the server's address.

    Examples:
      alaya serve ~/models/Llama-3.1-8B-Instruct --db contexts.db
      alaya serve --port 8001 --attention recovery:0.95
      ALAYA_API_KEY=... alaya serve --host 0.0.0.0 --name llama

    Then, in another terminal:
      curl http://127.0.0.1:8000/v1/completions \
        -H "Content-Type: application/json" \
        -d '{"prompt": "Three rivers:", "attention": "recovery:0.95"}'

    /v1/chat/completions and /v1/completions take what OpenAI's do, a plan in "attention", and a
    "document" in front of the first message; what is not served is refused by name. POST
    /v1/contexts stores a document, so that it is read once; GET lists them. /health says when the
    model is loaded, /metrics has numbers for Prometheus.

    Ctrl-C or SIGTERM: no new request is taken, and the server ends when those that run have ended;
    once more ends them.
    """
    if missing := [m for m in _NEEDED if importlib.util.find_spec(m) is None]:
        raise RequestError(
            f"a server needs {', '.join(missing)}; install the extra: pip install alaya_jax[serve]"
        )
    if api_key == "":
        raise typer.BadParameter("is empty; give a key, or leave it out", param_hint="--api-key")
    policy = options.attention(attention)
    path = options.database_path(db)

    from alaya_jax.serve import run
    from alaya_jax.serve.service import Service

    called = name or Path(model).expanduser().name
    socket = run.listen(host, port)
    at = f"http://{host if ':' not in host else f'[{host}]'}:{socket.getsockname()[1]}"
    soon = f"{at} answers soon: {called} is loaded first."

    def start() -> "Engine":
        from alaya_jax.budget import Budget
        from alaya_jax.cli import runtime
        from alaya_jax.compilation import compilations
        from alaya_jax.db import DB
        from alaya_jax.engine import Engine

        loaded = runtime.load_model(model, options.value(quantize), options.rope(rope))
        budget = Budget(memory, host_memory, runtime.indexes_of(policy, memory))
        database = DB(path, loaded, budget, namespace, store_dtype=options.value(store_dtype))
        engine = Engine(database, slots, chunk, waiting)
        if warmup:
            before, began = compilations().programs, time.perf_counter()
            engine.warm_up(policy, progress=True)
            count, took = compilations().programs - before, time.perf_counter() - began
            note(f"Warm: {count} programs in {took:.1f} s.")
        note(f"Ready, with {len(database.contexts)} contexts in {database.path}. Ctrl-C stops it.")
        return engine

    # Names that a page of another site could have made point here are none of ours.
    hosts = run.LOCAL if host in run.LOCAL and api_key is None else None
    service = Service(start, called, attention=attention, api_key=api_key, hosts=hosts)
    with socket:
        run.serve(service, socket, lambda: note(soon), lambda: note(_stopping(service)))
    if service.is_starting:  # nothing is lost, and a model takes long to load
        sys.stderr.flush()
        os._exit(0)


_NEEDED = ("prometheus_client", "starlette", "uvicorn")


def _stopping(service: "Service") -> str:
    running = len(service.ledger.running)
    if not running:
        return "Stopping."
    return f"Stopping when what runs has ended ({running} texts); once more ends it now."
