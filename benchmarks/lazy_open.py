"""From a stored context to the first attention output: read where it lies, or loaded first.

    python benchmarks/lazy_open.py [--tokens 131072] [--layers 4] [--rounds 3] [--directory DIR]

A context of Llama-3-8B's attention shape (8 kv heads of 128 for 32 heads, bfloat16, pages of 16),
with planted keys (`planted.py`), a graph and the leaves of a sketch, is stored once. Then, in
turns, with programs compiled and the database's files pushed out of the page cache: the
database is opened, a session created, one token's keys and values written and its queries answered
in every layer.

    loaded    every key and value is read into the pool, and `Full()` answers
    in files  pages stay in the files (`tier="host"`), and a plan reads those that it selects

Reports medians over the rounds of the seconds and of their ratio within a round; what was verified
of the context, what pages and indexes take on the device, and what the system then had of it in
memory, as shares of all keys and values; and how far the output is from the full one. With
--directory the stored context is kept there for another run. `--model` does the same for a whole
model: its context of `--model-tokens`, against computing it.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import ml_dtypes
import numpy as np
from bare import LLAMA_3_8B, on_device
from planted import Planted
from store_throughput import forget

import alaya_jax as aj
from alaya_jax.contexts.graphs import KIND
from alaya_jax.index.graph.build import link, query_lists

HEADS, KV_HEADS, DIM, GROUP = (*dataclasses.astuple(LLAMA_3_8B), LLAMA_3_8B.group)
ASKED = 0.05
"""Queries that the graph is built from, a share of the tokens."""

GRAPH = aj.Graph(queries=ASKED)


def recipe(layer: int, tokens: int) -> Planted:
    return Planted.create(tokens, KV_HEADS, GROUP, DIM, seed=layer)


def store(directory: Path, model: aj.Model, ids: np.ndarray, plans: dict[str, aj.Plan]) -> None:
    """Stores the context, its graph, and what a sketch knows of its pages."""
    tokens, layers = len(ids), model.config.num_hidden_layers

    def kv():
        for layer in range(layers):
            keys = recipe(layer, tokens).keys().astype(ml_dtypes.bfloat16)
            values = np.random.default_rng(layer).standard_normal(keys.shape, np.float32)
            yield keys, values.astype(ml_dtypes.bfloat16)

    def graphs():
        for layer in range(layers):
            data, spec = recipe(layer, tokens), GRAPH.spec
            asked, _ = data.queries(int(ASKED * tokens / GROUP))
            rows = jnp.asarray(asked.reshape(KV_HEADS, -1, DIM))
            lists = query_lists(
                jnp.asarray(data.keys()), tokens, rows, spec.listed, None, GRAPH.sink
            )
            made = link(lists, tokens, tokens, spec)
            near = np.asarray(made.neighbours)[:, :tokens]
            yield {"neighbours": near, "starts": np.asarray(made.starts)}

    with aj.DB(directory, model, aj.Budget(device="64MiB")) as db:
        if not db.contexts:
            db.import_context(ids, kv(), progress=False)
        (context,) = db.contexts
        files = db._catalogue.store
        if KIND not in files.indexes(context.id):
            files.write_index(context.id, KIND, GRAPH.built, graphs())
        first_output(db, ids, plans["sketch"], "host")


def first_output(db: aj.DB, ids: np.ndarray, plan: aj.Plan, tier: str) -> tuple[np.ndarray, dict]:
    """[L, H, D] of one new token's queries; and as shares of all keys and values, what was verified
    of the context, and what the session and indexes take on the device.
    """
    tokens, layers = len(ids), db.model.config.num_hidden_layers
    session, _ = db.create_session([*ids.tolist(), 0], tier=tier)
    with session:
        outputs = []
        for layer in range(layers):
            q = QUERIES[layer]
            kv = jnp.zeros((1, 1, KV_HEADS, DIM), jnp.bfloat16)
            session.update(q, kv, kv, layer)
            outputs.append(session.attention(q, layer, plan)[0, 0])
        done = jax.device_get(outputs)
        host = session.sequences[0].host
        verified = 1.0 if host is None else float(host._verified.mean())
        del host
        account = on_device(db, session)
        taken = account["pages"] + account["indexes"]
    said = {"verified": verified, "on_device": taken / (tokens * db.model.token_bytes)}
    return np.stack(done).astype(np.float32), {k: round(x, 4) for k, x in said.items()}


QUERIES: list[jax.Array] = []


def opened(directory: Path, model: aj.Model, ids: np.ndarray, plan: aj.Plan, tier: str):
    """The seconds that it takes, with nothing of the database in the page cache; its output."""
    gc.collect()  # what is mapped cannot be pushed out
    forget(directory)
    budget = aj.Budget(device="64MiB")
    if tier == "device":
        budget = aj.Budget.for_pages(model, (len(ids) + 4096) // 16)
    begun = time.perf_counter()
    with aj.DB(directory, model, budget) as db:
        out, said = first_output(db, ids, plan, tier)
        seconds = time.perf_counter() - begun
        (context,) = db.contexts
        with db._catalogue.store.mapped(context.id) as mapped:
            said["in_memory"] = round(mapped.resident_bytes() / (len(ids) * model.token_bytes), 4)
    return seconds, out, said


def compare(directory: Path, tokens: int, layers: int, rounds: int) -> None:
    model = LLAMA_3_8B.model(layers, tokens, "lazy")
    ids = np.random.default_rng(0).integers(0, 64, tokens).astype(np.int32)
    beta = recipe(0, tokens).beta
    plans = {
        "graph": aj.Plan(aj.DIPR(beta=beta), GRAPH),
        "sketch": aj.Plan(aj.DIPR(beta=beta), aj.Sketch()),
    }
    for layer in range(layers):
        q, _ = recipe(layer, tokens).queries(1, stream=2)
        QUERIES.append(jnp.asarray(q.reshape(1, 1, HEADS, DIM), jnp.bfloat16))
    store(directory, model, ids, plans)
    ways = {"loaded": (aj.Plan(aj.Full()), "device")}
    ways |= {f"in files, {name}": (plan, "host") for name, plan in plans.items()}
    for plan, tier in ways.values():  # compiled, and not measured
        opened(directory, model, ids, plan, tier)
    taken: dict[str, list[float]] = {way: [] for way in ways}
    outputs, said = {}, {}
    for _ in range(rounds):
        for way, (plan, tier) in ways.items():
            seconds, outputs[way], said[way] = opened(directory, model, ids, plan, tier)
            taken[way].append(seconds)
    full = outputs["loaded"]
    for way, seconds in taken.items():
        ratios = [a / b for a, b in zip(taken["loaded"], seconds, strict=True)]
        off = np.linalg.norm(outputs[way] - full, axis=-1) / np.linalg.norm(full, axis=-1)
        print(
            json.dumps(
                {
                    "way": way,
                    "bytes": tokens * model.token_bytes,
                    "seconds": round(statistics.median(seconds), 4),
                    "times_faster_than_loading": round(statistics.median(ratios), 2),
                    "ratios": [round(x, 2) for x in ratios],
                    "output_error_median": round(float(np.median(off)), 5),
                    **said[way],
                }
            ),
            flush=True,
        )


def of_a_model(name: str, tokens: int, rounds: int) -> None:
    """The first token behind a stored context: read where it lies, against computing it."""
    model = aj.load(name, progress=False)
    text = Path("alaya_jax/cli/data/constitution.txt").read_text()
    ids = model.tokenizer.encode(text * 8)[:tokens]
    question = [*ids, *model.tokenizer.encode(" In short,")]
    plan = aj.Plan(aj.DIPR(recovery=0.9), aj.Sketch())
    options = {"max_new_tokens": 1, "attention": plan, "prefill": plan, "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "db"
        with aj.DB(path, model, aj.Budget(device="1GiB")) as db:
            session, rest = db.create_session(question)
            list(aj.generate(session, rest, max_new_tokens=1, progress=False))  # compiled
            session.close()
            begun = time.perf_counter()
            session, rest = db.create_session(question)
            list(aj.generate(session, rest, max_new_tokens=1, progress=False))
            computed = time.perf_counter() - begun
            session.close()
            db.import_context(ids, progress=False)
        taken = []
        for _ in range(rounds + 2):  # the first compiles, and leaves the sketch's leaves
            gc.collect()
            forget(path)
            begun = time.perf_counter()
            with aj.DB(path, model, aj.Budget(device="64MiB")) as db:
                session, rest = db.create_session(question, tier="host")
                list(aj.generate(session, rest, **options))
                taken.append(time.perf_counter() - begun)
                session.close()
        seconds = statistics.median(taken[2:])
        row = {"way": f"{name}, in files", "tokens": len(ids), "seconds": round(seconds, 4)}
        row |= {"computing_seconds": round(computed, 3)}
        print(json.dumps(row | {"times_faster_than_computing": round(computed / seconds, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where the stored context is kept")
    parser.add_argument("--model", default="", help="such as smollm2-135m")
    parser.add_argument("--model-tokens", type=int, default=7_900)
    options = parser.parse_args()
    said = {k: str(v) for k, v in vars(options).items()}
    print(json.dumps({"benchmark": "lazy_open", **said, **machine.facts("jax", "alaya_jax")}))
    with tempfile.TemporaryDirectory() as folder:
        directory = options.directory or Path(folder)
        compare(directory / "db", options.tokens, options.layers, options.rounds)
    if options.model:
        of_a_model(options.model, options.model_tokens, options.rounds)


if __name__ == "__main__":
    main()
