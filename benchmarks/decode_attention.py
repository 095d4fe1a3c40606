"""One layer's attention of a decode step on the CPU: this library's plans and torch's in one run.

    python benchmarks/decode_attention.py [--lengths 1024,4096,16384,65536,131072]

Keys with planted critical sets (planted.py), of Llama-3-8B's shape (K 8, G 4, D 128), float32. The
sides take turns; the peer is a process of its own with the variants an expert would try, and the
fastest of them counts. Medians; ratio = peer's seconds / ours. Each query is another one. Beside
the time stands what the answer is worth: the true share of the attention mass that was attended to,
its mean and its least over queries and heads, and the relative error of the output.

"crossover" is the length at which a plan begins to be faster than this library's own `Full`, from
the lengths measured, linear between them on a logarithmic scale.

Keep the machine quiet. JSON lines on stdout and in benchmarks/results/decode_attention.jsonl. Exit
code 3: no peer here.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import numpy as np
from peers.environment import PeerProcess, PeerUnavailable, prepare
from planted import Planted

from alaya_jax import configs
from alaya_jax.attention import engine
from alaya_jax.cache import PageTable
from alaya_jax.index import Flat, Sketch
from alaya_jax.models import LlamaConfig
from alaya_jax.query import DIPR, Full, TopK, Window
from alaya_jax.query.plan import Plan

RESULTS = Path(__file__).resolve().parent / "results" / "decode_attention.jsonl"
HEADS, GROUP, DIM, PAGE = 8, 4, 128, 16
WINDOW = Window(128, 512)
SETTLE_S = 0.3  # thread pools spin for a while after their last work: let them fall asleep


def plans(beta: float) -> dict[str, Plan]:
    """By name; beta is that of alpha = 0.0144."""
    return {
        "full": Plan(Full()),
        "dipr_flat": Plan(DIPR(beta, WINDOW), Flat()),
        "dipr_sketch": Plan(DIPR(beta, WINDOW), Sketch()),
        "recovery_sketch": Plan(DIPR(recovery=0.99, window=WINDOW), Sketch()),
        "recovery_sketch_tail": Plan(DIPR(recovery=0.95, window=WINDOW), Sketch(), tail=True),
        "top100_sketch": Plan(TopK(100, WINDOW), Sketch()),
    }


class Layer:
    """A layer's pages, its sketch, and queries [turns, 1, 1, H, D] of the last token."""

    def __init__(self, planted: Planted, turns: int):
        n = planted.n
        self.planted, self.count = planted, -(-n // PAGE)

        def paged(x: np.ndarray) -> jax.Array:
            x = np.pad(x, ((0, 0), (PAGE, -n % PAGE), (0, 0)))
            return jnp.asarray(x.reshape(HEADS, self.count + 1, PAGE, DIM))

        self.k, self.v = (
            paged(planted.keys()),
            paged(np.random.default_rng(1).standard_normal((HEADS, n, DIM), np.float32)),
        )
        ids = jnp.arange(1, self.count + 1)
        config = LlamaConfig.from_hf(configs.load("llama-3-8b"))
        empty = Sketch().create(config, self.count + 1, PAGE)
        build = jax.jit(lambda layer, *args: layer.build(*args))
        filled = jnp.full(self.count, PAGE)
        self.sketch = jax.block_until_ready(build(empty, self.k, self.v, ids, filled))
        self.table = PageTable(ids[None].astype(jnp.int32), jnp.full(1, n - 1, jnp.int32))
        self.covered = jnp.full(1, (n - 1) // PAGE * PAGE, jnp.int32)
        queries = np.concatenate([planted.queries(1, i)[0] for i in range(turns)], axis=2)
        # [K, G, turns, D] -> one token of all heads each
        self.queries = jnp.asarray(
            np.moveaxis(queries, 2, 0).reshape(turns, 1, 1, HEADS * GROUP, DIM)
        )

    def attend(self, plan: Plan, turn: int):
        """Output and counts of one step."""
        index = self.sketch if isinstance(plan.index, Sketch) else None
        one = jnp.ones(1, jnp.int32)
        return engine.attend(
            plan, self.queries[turn], self.k, self.v, self.table, one, index, self.covered
        )


class Judge:
    """What a plan's output is worth, by every key's score in float64."""

    def __init__(self, layer: Layer, turn: int):
        n = layer.planted.n
        q = np.asarray(layer.queries[turn]).reshape(HEADS, GROUP, DIM).astype(np.float64)
        self.full = np.empty(q.shape)
        self.scores = np.empty((HEADS, GROUP, n), np.float32)
        for head in range(HEADS):
            k = np.asarray(layer.k[head, 1:]).reshape(-1, DIM)[:n]
            v = np.asarray(layer.v[head, 1:]).reshape(-1, DIM)[:n]
            scores = q[head] @ k.T
            weights = np.exp((scores - scores.max(-1, keepdims=True)) / np.sqrt(DIM))
            self.full[head] = weights @ v / weights.sum(-1, keepdims=True)
            self.scores[head] = scores

    def error(self, out) -> np.ndarray:
        """|out - full| / |full| of each head."""
        out = np.asarray(out).reshape(HEADS, GROUP, DIM)
        return np.linalg.norm(out - self.full, axis=-1) / np.linalg.norm(self.full, axis=-1)

    def mass(self, attended: np.ndarray) -> np.ndarray:
        """Share of the mass that the window and the best keys outside it hold, as many as were
        attended to: exact for DIPR and TopK; for a selection by estimates, from above.
        """
        n = self.scores.shape[-1]
        inside = np.zeros(n, bool)
        inside[: WINDOW.sink], inside[n - WINDOW.recent :] = True, True
        shares = []
        for scores, count in zip(self.scores.reshape(-1, n), attended.ravel(), strict=True):
            weights = np.exp((scores - scores.max()) / np.sqrt(DIM), dtype=np.float64)
            outside = np.sort(weights[~inside])[::-1][: max(count - inside.sum(), 0)]
            shares.append((weights[inside].sum() + outside.sum()) / weights.sum())
        return np.asarray(shares)


def measure(layer: Layer, peer: PeerProcess, rounds: int) -> dict:
    """Seconds of each plan and of each of the peer's variants, by turns; and the plans' worth."""
    chosen = plans(layer.planted.beta)
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    theirs: dict[str, list[float]] = {}
    worth = {}
    for name, plan in chosen.items():
        out, counts = jax.block_until_ready(layer.attend(plan, 0))  # compiles
        judge = Judge(layer, 0)
        attended = np.asarray(counts.attended)
        mass = judge.mass(attended)
        worth[name] = {
            "keys": round(float(attended.mean()), 1),
            "keys_read": round(float(np.mean(counts.read)), 1),
            "mass": round(float(mass.mean()), 5),
            "least_mass": round(float(mass.min()), 5),
            "error": round(float(judge.error(out).mean()), 5),
        }
    for turn in range(rounds):
        for name, plan in chosen.items():
            started = time.perf_counter()
            jax.block_until_ready(layer.attend(plan, turn))
            seconds[name].append(time.perf_counter() - started)
        time.sleep(SETTLE_S)
        found = peer.ask("measure", length=layer.planted.n, repeats=1)["seconds"]
        for name, values in found.items():
            theirs.setdefault(name, []).extend(values)
        time.sleep(SETTLE_S)
    ours = {name: float(np.median(values)) for name, values in seconds.items()}
    their = {name: float(np.median(values)) for name, values in theirs.items()}
    best = min(their.values())
    return {
        "length": layer.planted.n,
        "peer_ms": {name: round(1e3 * x, 2) for name, x in their.items()},
        "ours_ms": {name: round(1e3 * x, 2) for name, x in ours.items()},
        "times_full": {name: round(ours["full"] / x, 2) for name, x in ours.items()},
        "times_peer": {name: round(best / x, 2) for name, x in ours.items()},
        "times_sdpa_gqa_f32": {
            name: round(their["sdpa_gqa_f32"] / x, 2) for name, x in ours.items()
        },
        "worth": worth,
    }


def crossover(rows: list[dict], name: str) -> float | None:
    """Length at which a plan's time falls below `full`'s; None: nowhere between those measured."""
    points = [(np.log2(r["length"]), np.log(r["times_full"][name])) for r in rows]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 < 0 <= y1:
            return round(float(2 ** (x0 - y0 * (x1 - x0) / (y1 - y0))))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="1024,4096,16384,65536,131072")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    try:
        interpreter = prepare(options.peer_python)
    except PeerUnavailable as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    RESULTS.parent.mkdir(exist_ok=True)
    log = machine.ROOT / ".cache" / "attention_peer.log"
    with (
        RESULTS.open("a") as file,
        PeerProcess(interpreter, log, "attention_peer.py") as peer,
    ):

        def put(row: dict) -> None:
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")

        shape = {"kv_heads": HEADS, "group": GROUP, "dim": DIM}
        loaded = peer.ask("load", **shape, threads=machine.cores())
        facts = machine.facts("alaya_jax", "jax", "jaxlib", "numpy")
        put({"benchmark": "decode_attention", **shape, **loaded, **facts})
        rows = []
        for n in map(int, options.lengths.split(",")):
            layer = Layer(Planted.create(n, HEADS, GROUP, DIM), options.rounds)
            rows.append(measure(layer, peer, options.rounds))
            put(rows[-1])
        names = [name for name in rows[0]["ours_ms"] if name != "full"]
        put({"crossover": {name: crossover(rows, name) for name in names}})


if __name__ == "__main__":
    main()
