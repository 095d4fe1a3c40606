"""What decoding takes on the device, by account, while the context lies in files.

    python benchmarks/tier_bytes.py [--tokens 131072] [--layers 1] [--steps 8] [--graph]
        [--bits 2,4,learnt1]

A context of Llama-3-8B's attention shape (8 kv heads of 128 for 32 heads, bfloat16, pages of 16),
with planted keys (`planted.py`), is stored, opened where it lies (`tier="host"`), and asked for
some steps: one token's keys and values are written, its queries answered in every layer. Every
account grows with the layers alike, so a few stand for all 32: shares are of all keys and values of
as many layers. What is counted:

    pages      of the pool that are in use: the new tokens, and the page that the first is written
               to
    window     the first 128 and last 512 tokens, which attention always reads. A CPU reads them in
               the files, so they are not in `pages`; a device that cannot would hold them
    index      what indexes know: of the pool's pages, and of those in the files (their leaves, or
               the graph), where the row says that the index is on the device

Bases of learnt sketches are those of the planted keys, from queries of their own.

With the index on the host its leaves are mapped like the pages; on the device they are held beside
the pool. That is the row's arithmetic, of sizes that were measured: on a CPU both are one memory.
The goals are 10% with the index on the device, 2% with it on the host. `output_error` is that of
the last step's outputs against full attention: an account stands beside what it buys.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import ml_dtypes
import numpy as np
from bare import LLAMA_3_8B, on_device
from planted import Planted, learnt
from real_keys import asked

import alaya_jax as aj
from alaya_jax.contexts.graphs import KIND
from alaya_jax.index.graph.build import build
from alaya_jax.index.learnt import keep

SHAPE = LLAMA_3_8B
ASKED = 0.01
"""Queries that the graph is built from, a share of the tokens: its size does not depend on them."""

GOALS = {"device": 0.10, "host": 0.02}


def recipe(layer: int, tokens: int) -> Planted:
    return Planted.create(tokens, SHAPE.kv_heads, SHAPE.group, SHAPE.dim, seed=layer)


def store(db: aj.DB, ids: np.ndarray, layers: int, graph: aj.Graph | None) -> None:
    """Stores the context and, if asked to, its graph."""

    def kv() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for layer in range(layers):
            keys = recipe(layer, len(ids)).keys().astype(ml_dtypes.bfloat16)
            values = np.random.default_rng(layer).standard_normal(keys.shape, np.float32)
            yield keys, values.astype(ml_dtypes.bfloat16)

    def graphs(index: aj.Graph) -> Iterator[dict[str, np.ndarray]]:
        for layer in range(layers):
            data = recipe(layer, len(ids))
            made_from, _ = data.queries(int(ASKED * len(ids) / SHAPE.group))
            rows = jnp.asarray(made_from.reshape(SHAPE.kv_heads, -1, SHAPE.dim))
            keys = jnp.asarray(data.keys())
            made = build(keys, len(ids), rows, low=index.sink, spec=index.spec)
            near = np.asarray(made.neighbours)[:, : len(ids)]
            yield {"neighbours": near, "starts": np.asarray(made.starts)}

    context = db.import_context(ids, kv(), progress=False)
    if graph is not None:
        db._catalogue.store.write_index(context.id, KIND, graph.built, graphs(graph))


def decoded(
    db: aj.DB, ids: np.ndarray, plan: aj.Plan, steps: int
) -> tuple[dict[str, int], np.ndarray]:
    """What is on the device after some steps, by account, and the last step's outputs [L, H, D]."""
    layers = db.model.config.num_hidden_layers
    session, _ = db.create_session([*ids.tolist(), 0], tier="host")
    outputs: list[np.ndarray] = []
    with session:
        for step in range(steps):
            outputs = []
            for layer in range(layers):
                q, _ = recipe(layer, len(ids)).queries(steps, stream=2)
                rows = jnp.asarray(q[:, :, step].reshape(1, 1, SHAPE.heads, -1), jnp.bfloat16)
                new = jnp.zeros((1, 1, SHAPE.kv_heads, SHAPE.dim), jnp.bfloat16)
                session.update(rows, new, new, layer)
                out = session.attention(rows, layer, plan)[0, 0]
                outputs.append(np.asarray(jax.device_get(out), np.float32))
        return on_device(db, session), np.stack(outputs)


def accounts(
    directory: Path, tokens: int, layers: int, steps: int, bits: Sequence[str], *, graph: bool
) -> Iterator[dict[str, Any]]:
    """A row for each plan and place of its index."""
    model = SHAPE.model(layers, tokens + steps, "tier-bytes")
    model = dataclasses.replace(model, directory=directory)
    recipes = [recipe(layer, tokens) for layer in range(layers)]
    keep(learnt(recipes, model.fingerprint), directory)
    ids = np.random.default_rng(0).integers(0, 64, tokens).astype(np.int32)
    query = aj.DIPR(beta=recipe(0, tokens).beta)
    plans = {f"sketch, {name}": aj.Plan(query, asked(name)) for name in bits}
    known = aj.Graph(queries=ASKED) if graph else None
    if known is not None:
        plans["graph"] = aj.Plan(query, known)
    whole = tokens * model.token_bytes
    window = (query.window.sink + query.window.recent) * model.token_bytes
    with aj.DB(directory / "db", model, aj.Budget.for_pages(model, 64, indexes="1GiB")) as db:
        store(db, ids, layers, known)
        (context,) = db.contexts
        _, full = decoded(db, ids, aj.Plan(aj.Full()), steps)
        for name, plan in plans.items():
            db._catalogue.indexes._indexes.clear()  # an account for each plan
            before = dict(db._catalogue.store.leaves(context.id))
            taken, out = decoded(db, ids, plan, steps)
            there = db._catalogue.store.leaves(context.id)
            in_files = sum(there.values()) - sum(before.values())
            if name == "graph":
                in_files = taken["graphs"]
            off = np.linalg.norm(out - full, axis=-1) / np.linalg.norm(full, axis=-1)
            for place, goal in GOALS.items():
                index = taken["indexes"] + (in_files if place == "device" else 0)
                total = taken["pages"] + window + index
                yield {
                    "plan": name,
                    "index_on": place,
                    "tokens": tokens,
                    "layers": layers,
                    "all_keys_and_values": whole,
                    "pages": taken["pages"],
                    "window": window,
                    "index": index,
                    "share": round(total / whole, 4),
                    "goal": goal,
                    "output_error": round(float(np.median(off)), 5),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--bits", default="2,4,learnt1", help="of sketches")
    parser.add_argument("--graph", action="store_true", help="build one, for some minutes a layer")
    options = parser.parse_args()
    said = {name: str(value) for name, value in vars(options).items()}
    print(json.dumps({"benchmark": "tier_bytes", **said, **machine.facts("jax", "alaya_jax")}))
    with tempfile.TemporaryDirectory() as folder:
        size = options.tokens, options.layers, options.steps, options.bits.split(",")
        for row in accounts(Path(folder), *size, graph=options.graph):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
