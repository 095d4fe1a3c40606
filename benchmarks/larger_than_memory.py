"""Decoding behind a context that is larger than memory, where it lies in files.

    python benchmarks/larger_than_memory.py [--tokens 1048576] [--layers 16] [--steps 4]
        [--plans graph sketch] [--queries 0.02] [--degree 16] [--host 4GiB] [--directory DIR]

A context of Llama-3.2-1B's attention shape (8 kv heads of 64 for 32 heads, bfloat16, pages of 16)
is stored with a graph; 1,048,576 tokens of 16 layers are 32 GiB. Then, each plan in a process of
its own, some steps: in every layer one token's keys and values are written, and its queries
answered. Of a step are reported the seconds, the bytes that came from the disk (/proc/self/io), and
the process's memory: `rss` as it is after the step, mapped files included, and `rss_peak`. Beside
it stands the longest context of the shape that fits into this machine's memory when all is loaded.

What is synthetic. Keys have planted critical sets (`planted.py`), of one layer. The keys and
queries of the others are that layer's under a permutation of channels with signs, another one for
each layer: the files differ, and inner products do not, not even in their last bit. So ONE graph
truly is the graph of every layer, and is built once (`--queries` of the tokens; at full size some
ten CPU-minutes). Values are noise of mean 0, the same in all layers. Every layer and step asks
queries of its own.

`mass` is the share of the attention mass that a plan's keys hold, from outputs: with values that
are independent of keys and of each other, the full output o is m o' plus what the other keys add,
whose mean is 0, so m = <o, o'> / <o', o'>; full attention is computed from the planted keys, block
by block. It is the mean over all layers, heads and steps.

With --directory all that was made stays there, and another run goes on from it; without, it is
deleted. Nothing holds more than a few hundred MiB of keys at a time.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import ml_dtypes
import numpy as np
from bare import LLAMA_3_2_1B
from planted import BLOCK, Planted

import alaya_jax as aj
from alaya_jax.contexts.graphs import KIND
from alaya_jax.index.graph.build import build

SHAPE = LLAMA_3_2_1B
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
AT_ONCE = 4
"""Layers whose keys are on their way to the store."""


class Made:
    """What is made once, in files below a directory: keys and values of the planted layer, the
    graph, and the database. Everything that is there already is kept.
    """

    def __init__(self, options: argparse.Namespace):
        self.options, self.directory = options, options.directory
        self.tokens, self.layers = options.tokens, options.layers
        self.recipe = Planted.create(self.tokens, SHAPE.kv_heads, SHAPE.group, SHAPE.dim)
        self.graph = aj.Graph(degree=options.degree, queries=options.queries, l0=options.l0)
        self.model = SHAPE.model(self.layers, self.tokens, "larger-than-memory")
        self.ids = np.random.default_rng(0).integers(0, 64, self.tokens).astype(np.int32)

    def database(self) -> aj.DB:
        """With room for new tokens alone."""
        budget = aj.Budget.for_pages(self.model, 64, host=self.options.host, indexes="1GiB")
        return aj.DB(self.directory / "db", self.model, budget)

    def plan(self, name: str) -> aj.Plan:
        """The range of alpha 0.0144, through a graph or a sketch of 2 bits."""
        index = {"graph": self.graph, "sketch": aj.Sketch(2)}[name]
        return aj.Plan(aj.DIPR(beta=self.recipe.beta), index)

    def queries(self) -> np.ndarray:
        """Of the planted layer, float32 [L, steps, K, G, D]."""
        steps = self.options.steps
        q, _ = self.recipe.queries(self.layers * steps, stream=2)
        q = q.astype(BFLOAT16).astype(np.float32)
        return q.reshape(SHAPE.kv_heads, SHAPE.group, self.layers, steps, -1).transpose(
            2, 3, 0, 1, 4
        )

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of the planted layer, bits of bfloat16 [K, N, D] each, mapped."""

        def blocks(kind: str, start: int) -> np.ndarray:
            if kind == "keys":
                return self.recipe.key_block(start)
            count = min(BLOCK, self.tokens - start)
            rng = np.random.default_rng((1, start))
            return rng.standard_normal((SHAPE.kv_heads, count, SHAPE.dim), np.float32)

        for kind in ("keys", "values"):
            with self._once(kind, np.uint16, (SHAPE.kv_heads, self.tokens, SHAPE.dim)) as made:
                for start in range(0, self.tokens if made is not None else 0, BLOCK):
                    block = blocks(kind, start).astype(BFLOAT16).view(np.uint16)
                    made[:, start : start + BLOCK] = block
        return self._mapped("keys"), self._mapped("values")

    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """The graph, int32 [K, N, R], mapped, and its starts [K, E]; a head at a time."""
        keys, _ = self.halves()
        asked, _ = self.recipe.queries(max(1, int(self.graph.queries * self.tokens / SHAPE.group)))
        near, starts = [], []
        for head in range(SHAPE.kv_heads):
            name = f"graph-{head}"
            with self._once(name, np.int32, (self.tokens, self.graph.degree)) as made:
                if made is not None:
                    begun = time.perf_counter()
                    there = jnp.asarray(keys[head].view(BFLOAT16)).astype(jnp.float32)[None]
                    rows = jnp.asarray(asked[head].reshape(1, -1, SHAPE.dim))
                    graph = build(
                        there, self.tokens, rows, low=self.graph.sink, spec=self.graph.spec
                    )
                    made[:] = np.asarray(graph.neighbours)[0, : self.tokens]
                    np.save(self.directory / f"starts-{head}.npy", np.asarray(graph.starts)[0])
                    show("graph", head=head, seconds=round(time.perf_counter() - begun, 1))
            near.append(self._mapped(name))
            starts.append(np.load(self.directory / f"starts-{head}.npy"))
        return near, np.stack(starts)  # type: ignore[return-value]

    def store(self) -> None:
        """The database: the context, its graph in every layer, and a sketch's leaves if asked."""
        with self.database() as db:
            if not db.contexts:
                begun = time.perf_counter()
                store, header = db._catalogue.store, db._catalogue.header
                store.write(header, self.ids, self._layers())
                show("stored", seconds=round(time.perf_counter() - begun, 1))
        with self.database() as db:
            (context,) = db.contexts
            files = db._catalogue.store
            if "graph" in self.options.plans and KIND not in files.indexes(context.id):
                near, starts = self.neighbours()
                arrays = {"neighbours": np.stack(near), "starts": starts}
                files.write_index(context.id, KIND, self.graph.built, [arrays] * self.layers)
            show("database", bytes_on_disk=files.stats().bytes_on_disk, bytes=context.nbytes)

    def _layers(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Keys and values of each layer, in turns in a few files that are mapped."""
        keys, values = self.halves()
        scratch = [self.directory / f"turn-{i}.npy" for i in range(AT_ONCE)]
        for layer in range(self.layers):
            place, signs = channels(layer)
            turned = np.lib.format.open_memmap(
                scratch[layer % AT_ONCE], "w+", np.uint16, keys.shape
            )
            for head in range(len(keys)):
                for start in range(0, self.tokens, BLOCK):
                    part = keys[head, start : start + BLOCK]
                    turned[head, start : start + BLOCK] = part[:, place] ^ signs
            yield turned.view(BFLOAT16), values.view(BFLOAT16)
            del turned
        for path in scratch:
            path.unlink(missing_ok=True)

    def _once(self, name: str, dtype: Any, shape: tuple[int, ...]) -> "_Once":
        return _Once(self.directory / f"{name}.npy", dtype, shape)

    def _mapped(self, name: str) -> np.ndarray:
        return np.load(self.directory / f"{name}.npy", mmap_mode="r")


class _Once:
    """An array in a file that is there when all of it is: None where it was there before."""

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...]):
        self.path, self.new = path, path.with_suffix(".part")
        self.made = (dtype, shape)

    def __enter__(self) -> np.ndarray | None:
        if self.path.exists():
            return None
        dtype, shape = self.made
        self.array = np.lib.format.open_memmap(self.new, "w+", dtype, shape)
        return self.array

    def __exit__(self, failed: Any, *_: object) -> None:
        if failed is None and not self.path.exists():
            self.array.flush()
            self.new.rename(self.path)


def channels(layer: int) -> tuple[np.ndarray, np.ndarray]:
    """A permutation of channels [D], and the sign bits u16 [D] that they get behind it."""
    rng = np.random.default_rng((2, layer))
    return rng.permutation(SHAPE.dim), (rng.integers(0, 2, SHAPE.dim) << 15).astype(np.uint16)


def turned(q: np.ndarray, layer: int) -> np.ndarray:
    """Queries [..., D] as a layer asks them."""
    place, signs = channels(layer)
    return q[..., place] * np.where(signs > 0, np.float32(-1), np.float32(1))


def ask(made: Made, name: str) -> None:
    """Some steps by one plan: reports each, and leaves outputs [L, steps, K, G, D] in a file."""
    plan, q = made.plan(name), made.queries()
    outputs = np.zeros(q.shape, np.float32)
    new = jnp.zeros((1, 1, SHAPE.kv_heads, SHAPE.dim), jnp.bfloat16)
    with made.database() as db:
        session, _ = db.create_session([*made.ids.tolist(), 0], tier="host")
        with session:
            for step in range(made.options.steps):
                before, begun = read_bytes(), time.perf_counter()
                for layer in range(made.layers):
                    asked = turned(q[layer, step], layer).reshape(1, 1, SHAPE.heads, -1)
                    rows = jnp.asarray(asked, jnp.bfloat16)
                    session.update(rows, new, new, layer)
                    out = np.asarray(jax.device_get(session.attention(rows, layer, plan)))
                    outputs[layer, step] = out.reshape(q.shape[2:])
                show(
                    "step",
                    plan=name,
                    step=step,
                    seconds=round(time.perf_counter() - begun, 3),
                    bytes_read=read_bytes() - before,
                    rss=resident_bytes(),
                    rss_peak=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                )
    np.save(made.directory / f"out-{name}.npy", outputs)


def full(made: Made) -> np.ndarray:
    """Full attention of the same queries; a step's own tokens have keys and values that are 0."""
    keys, values = made.halves()
    q = made.queries()
    rows = jnp.asarray(q.transpose(2, 3, 0, 1, 4).reshape(SHAPE.kv_heads, -1, SHAPE.dim))
    own = np.broadcast_to(1 + np.arange(q.shape[1]), (SHAPE.group, made.layers, q.shape[1]))
    most = jnp.zeros(rows.shape[:2])
    total = jnp.broadcast_to(jnp.asarray(own.reshape(-1), jnp.float32), most.shape)
    state = most, total, jnp.zeros(rows.shape)
    for start in range(0, made.tokens, BLOCK):
        part = (x[:, start : start + BLOCK].view(BFLOAT16) for x in (keys, values))
        state = _fold(rows, *map(jnp.asarray, part), state)
    out = np.asarray(state[2] / state[1][..., None])
    shape = SHAPE.kv_heads, SHAPE.group, made.layers, q.shape[1], SHAPE.dim
    return out.reshape(shape).transpose(2, 3, 0, 1, 4)


@jax.jit
def _fold(q: Any, k: Any, v: Any, state: Any) -> Any:
    most, total, out = state
    scores = jnp.einsum("kqd,ksd->kqs", q, k.astype(jnp.float32)) * q.shape[-1] ** -0.5
    now = jnp.maximum(most, scores.max(-1))
    p, old = jnp.exp(scores - now[..., None]), jnp.exp(most - now)
    more = jnp.einsum("kqs,ksd->kqd", p, v.astype(jnp.float32))
    return now, total * old + p.sum(-1), out * old[..., None] + more


def judged(made: Made, name: str, truth: np.ndarray) -> dict[str, float]:
    """How much of the attention a plan's outputs hold, and how far they are off."""
    out = np.load(made.directory / f"out-{name}.npy")
    mass = (truth * out).sum(-1) / (out * out).sum(-1)
    off = np.linalg.norm(out - truth, axis=-1) / np.linalg.norm(truth, axis=-1)
    return {"mass": round(float(mass.mean()), 4), "output_error": round(float(np.median(off)), 4)}


def read_bytes() -> int:
    """What this process had to have read from the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def show(what: str, **row: Any) -> None:
    print(json.dumps({"result": what, **row}), flush=True)


def run(options: argparse.Namespace) -> None:
    made = Made(options)
    made.halves()
    made.store()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    bytes_a_token = made.model.token_bytes
    show(
        "loading all",
        bytes=made.tokens * bytes_a_token,
        memory=memory,
        most_tokens=memory // bytes_a_token,
    )
    again = [sys.executable, __file__, "--directory", str(options.directory)]
    for name in ("tokens", "layers", "steps", "queries", "degree", "l0"):
        again += [f"--{name}", str(getattr(options, name))]
    again += ["--host", options.host] if options.host else []
    truth = full(made)
    for name in options.plans:
        if name == "sketch":  # its leaves are made by one process, and found by the next
            subprocess.run([*again, "--ask", name], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*again, "--ask", name], check=True)
        show("plan", plan=name, **judged(made, name, truth))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1 << 20, help="a multiple of 16")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--plans", nargs="*", choices=["graph", "sketch"], default=["graph", "sketch"]
    )
    parser.add_argument("--queries", type=float, default=0.02, help="a share of the tokens")
    parser.add_argument("--degree", type=int, default=16)
    parser.add_argument("--l0", type=int, default=256, help="how far a walk goes at least")
    parser.add_argument("--host", help="what of mapped files is kept in memory, such as 4GiB")
    parser.add_argument("--directory", type=Path, help="what is made stays there")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        ask(Made(options), options.ask)
        return
    said = {name: str(value) for name, value in vars(options).items() if name != "ask"}
    print(
        json.dumps({"benchmark": "larger_than_memory", **said, **machine.facts("jax", "alaya_jax")})
    )
    if options.directory is not None:
        options.directory.mkdir(parents=True, exist_ok=True)
        run(options)
        return
    options.directory = Path(tempfile.mkdtemp())
    try:
        run(options)
    finally:
        shutil.rmtree(options.directory)


if __name__ == "__main__":
    main()
