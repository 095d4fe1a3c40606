"""A vector database that owns a language model's KV cache and computes its attention.

    import alaya_jax as aj

    model = aj.load("smollm2-135m")
    db = aj.DB("contexts.db", model)
    db.import_context(document=document)
    messages = [{"role": "user", "content": question}]
    session, rest = db.create_session(messages=messages, document=document)
    for token in aj.generate(session, rest, attention=aj.DIPR(beta=50.0)):
        print(token.text, end="")

Names are imported when first used, so `import alaya_jax` costs no jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from alaya_jax.budget import Budget as Budget
    from alaya_jax.compilation import compilations as compilations
    from alaya_jax.conversation import chat as chat
    from alaya_jax.db import DB as DB
    from alaya_jax.engine import Engine as Engine
    from alaya_jax.engine import Request as Request
    from alaya_jax.engine.scoring import score as score
    from alaya_jax.errors import AlayaError as AlayaError
    from alaya_jax.errors import RemoteWarning as RemoteWarning
    from alaya_jax.generation import Token as Token
    from alaya_jax.generation import generate as generate
    from alaya_jax.index import Block as Block
    from alaya_jax.index import Flat as Flat
    from alaya_jax.index import Graph as Graph
    from alaya_jax.index import Sketch as Sketch
    from alaya_jax.model import Model as Model
    from alaya_jax.model import load as load
    from alaya_jax.models.rendered import Rendered as Rendered
    from alaya_jax.optimizer.calibrate import calibrate as calibrate
    from alaya_jax.query import DIPR as DIPR
    from alaya_jax.query import Custom as Custom
    from alaya_jax.query import Full as Full
    from alaya_jax.query import Tiles as Tiles
    from alaya_jax.query import TopK as TopK
    from alaya_jax.query import Window as Window
    from alaya_jax.query.auto import Auto as Auto
    from alaya_jax.query.plan import Plan as Plan
    from alaya_jax.rope import Rope as Rope
    from alaya_jax.runtime.sampling.constraint import Constraint as Constraint
    from alaya_jax.runtime.sampling.params import Greedy as Greedy
    from alaya_jax.runtime.sampling.params import Sampling as Sampling
    from alaya_jax.session import Session as Session
    from alaya_jax.sharding import ShardingRules as ShardingRules
    from alaya_jax.sharding import make_mesh as make_mesh

_HOME = {
    "AlayaError": "errors",
    "Auto": "query.auto",
    "Block": "index",
    "Budget": "budget",
    "Constraint": "runtime.sampling.constraint",
    "DB": "db",
    "Custom": "query",
    "DIPR": "query",
    "Engine": "engine",
    "Flat": "index",
    "Full": "query",
    "Graph": "index",
    "Greedy": "runtime.sampling.params",
    "Model": "model",
    "Plan": "query.plan",
    "RemoteWarning": "errors",
    "Rendered": "models.rendered",
    "Request": "engine",
    "Rope": "rope",
    "Sampling": "runtime.sampling.params",
    "Session": "session",
    "ShardingRules": "sharding",
    "Sketch": "index",
    "Tiles": "query",
    "Token": "generation",
    "TopK": "query",
    "Window": "query",
    "calibrate": "optimizer.calibrate",
    "compilations": "compilation",
    "chat": "conversation",
    "generate": "generation",
    "load": "model",
    "make_mesh": "sharding",
    "score": "engine.scoring",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
