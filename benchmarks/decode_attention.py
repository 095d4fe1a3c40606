"""One layer's attention of a decode step on the CPU: this library's plans and torch's in one run.

    python benchmarks/decode_attention.py [--lengths 1024,4096,16384,65536,131072] [--queries 20]
    python benchmarks/decode_attention.py --lengths 1048576 --kv-heads 1 --queries 80

Keys with planted critical sets (planted.py), of Llama-3-8B's shape (K 8, G 4, D 128), float32. The
sides take turns; the peer is a process of its own with the variants an expert would try, and the
fastest of them counts. Medians; ratio = peer's seconds / ours. Each query is another one. Beside
the time stands what the answer is worth, over all queries and heads: the true share of the
attention mass that was attended to, its mean and its least, the mean relative error of the output,
and how many searches overflowed ("widened").

`--bits 4,learnt2,learnt1` measures plans through several sketches, whose names end with the bits if
these are not the default's; a learnt basis is that of the planted keys, from queries of its own.

"dipr_graph" walks a graph built from queries of its own (not those asked), one for each `--queries`
th key; it is measured from `GRAPH_FROM` keys on. What building it took stands beside the numbers.

"crossover" is the length at which a plan begins to be faster than this library's own `Full`, from
the lengths measured, linear between them on a logarithmic scale.

Keep the machine quiet. JSON lines on stdout and in benchmarks/results/decode_attention.jsonl. Exit
code 3: no peer here.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import numpy as np
import real_keys
from peers.environment import PeerProcess, PeerUnavailable, prepare
from planted import Planted, learnt

from alaya_jax import configs
from alaya_jax.attention import engine
from alaya_jax.cache import PageTable
from alaya_jax.explain.truth import truth
from alaya_jax.index import Flat, Graph, Graphs, LayerIndex, Sketch
from alaya_jax.index.graph.build import build as build_graph
from alaya_jax.index.memory import LayerMemory
from alaya_jax.models import LlamaConfig
from alaya_jax.query import DIPR, Full, TopK, Window
from alaya_jax.query.plan import Plan

RESULTS = Path(__file__).resolve().parent / "results" / "decode_attention.jsonl"
GROUP, DIM, PAGE = 4, 128, 16
WINDOW = Window(128, 512)
GRAPH = Graph()
GRAPH_FROM = 16384  # keys; planted sets are fewer and smaller below, and searches short
BUILD_STREAM = 1000  # of queries: none of those asked
SETTLE_S = 0.3  # thread pools spin for a while after their last work: let them fall asleep


def plans(beta: float, sketches: dict[str, Sketch]) -> dict[str, Plan]:
    """By name; beta is that of alpha = 0.0144."""
    found = {"full": Plan(Full()), "dipr_flat": Plan(DIPR(beta, WINDOW), Flat())}
    for bits, sketch in sketches.items():
        recovery, most = DIPR(recovery=0.99, window=WINDOW), DIPR(recovery=0.95, window=WINDOW)
        of_bits = {
            "dipr_sketch": Plan(DIPR(beta, WINDOW), sketch),
            "recovery_sketch": Plan(recovery, sketch),
            "recovery_sketch_tail": Plan(most, sketch, tail=True),
            "top100_sketch": Plan(TopK(100, WINDOW), sketch),
        }
        end = "" if sketch == Sketch() else f"_{bits}"
        found |= {name + end: plan for name, plan in of_bits.items()}
    return {**found, "dipr_graph": Plan(DIPR(beta, WINDOW), GRAPH)}


class Layer:
    """A layer's pages, its indexes, and queries [1, 1, H, D] of the last token.

    Args:
      planted: keys, and what queries ask for.
      turns: how many queries there are.
      queries: the graph is built from one query for so many keys; 0 for no graph.
      sketches: that there are.
    """

    def __init__(
        self,
        planted: Planted,
        turns: int,
        queries: int = 0,
        sketches: Sequence[Sketch] = (Sketch(),),
    ):
        n, heads = planted.n, planted.kv_heads
        self.planted, self.count = planted, -(-n // PAGE)

        def paged(x: np.ndarray) -> jax.Array:
            x = np.pad(x, ((0, 0), (PAGE, -n % PAGE), (0, 0)))
            return jnp.asarray(x.reshape(heads, self.count + 1, PAGE, DIM))

        self.k, self.v = (
            paged(planted.keys()),
            paged(np.random.default_rng(1).standard_normal((heads, n, DIM), np.float32)),
        )
        ids = jnp.arange(1, self.count + 1)
        config = LlamaConfig.from_hf(configs.load("llama-3-8b"))
        config = dataclasses.replace(
            config, num_key_value_heads=heads, num_attention_heads=heads * GROUP
        )
        found = learnt([planted], "planted")
        self.sketches = {
            spec: jax.block_until_ready(
                real_keys.sketched(spec, config, self.k, self.v, *real_keys.bases(spec, found, 1))
            )
            for spec in sketches
        }
        self.table = PageTable(ids[None].astype(jnp.int32), jnp.full(1, n - 1, jnp.int32))
        self.covered = jnp.full(1, (n - 1) // PAGE * PAGE, jnp.int32)
        # [K, G, 1, D] -> one token of all heads each
        self.queries = [
            jnp.asarray(planted.queries(1, i)[0].reshape(1, 1, heads * GROUP, DIM))
            for i in range(turns)
        ]
        self.one = jnp.ones(1, jnp.int32)
        self.graphs: Graphs | None = None
        self.graph_facts = {}
        if queries:
            asked, _ = planted.queries(n // (GROUP * queries), BUILD_STREAM)
            asked = jnp.asarray(asked.reshape(heads, -1, DIM))
            keys = self.k[:, 1:].reshape(heads, -1, DIM)
            started = time.perf_counter()
            graph = build_graph(keys, n, asked, low=WINDOW.sink, spec=GRAPH.spec)
            self.graphs = (jax.block_until_ready(graph),)
            self.graph_facts = {
                "graph_queries": asked.shape[1],
                "graph_seconds": round(time.perf_counter() - started, 1),
                "graph_share_of_kv": round(graph.neighbours.nbytes / (2 * self.k.nbytes), 3),
            }

    def index(self, plan: Plan) -> LayerIndex | Graphs | None:
        """What the plan's index holds."""
        if isinstance(plan.index, Graph):
            return self.graphs
        return self.sketches[plan.index] if isinstance(plan.index, Sketch) else None

    def attend(self, plan: Plan, turn: int):
        """Output and counts of one step."""
        index, q = self.index(plan), self.queries[turn]
        memory = LayerMemory(self.k, self.v, self.table, index, self.covered)
        return engine.attend(plan, q, memory, self.one)

    def mass(self, plan: Plan, turn: int) -> np.ndarray:
        """The true share of the attention mass that the plan attends to, of each head."""
        pages = (self.k, self.v, self.table.pages[0], None)
        q, n = self.queries[turn][0, 0], self.planted.n
        index, covered = self.index(plan), self.covered[0]
        judged = truth(plan, q, pages, jnp.int32(n), index, covered, jnp.float32(0.99))
        return np.asarray(judged.recovery)


def full_attention(layer: Layer, turn: int) -> np.ndarray:
    """Attention over all keys in float64, [K, G, D]."""
    n, heads = layer.planted.n, layer.planted.kv_heads
    q = np.asarray(layer.queries[turn]).reshape(heads, GROUP, DIM).astype(np.float64)
    out = np.empty(q.shape)
    for head in range(heads):
        k, v = (np.asarray(pool[head, 1:]).reshape(-1, DIM)[:n] for pool in (layer.k, layer.v))
        scores = q[head] @ k.T
        weights = np.exp((scores - scores.max(-1, keepdims=True)) / np.sqrt(DIM))
        out[head] = weights @ v / weights.sum(-1, keepdims=True)
    return out


def worth(layer: Layer, plan: Plan, full: list[np.ndarray]) -> dict:
    """What a plan's answers are worth, of all queries."""
    counts, errors, masses = [], [], []
    for turn, exact in enumerate(full):
        out, count = layer.attend(plan, turn)
        out = np.asarray(out).reshape(exact.shape)
        errors.append(np.linalg.norm(out - exact, axis=-1) / np.linalg.norm(exact, axis=-1))
        counts.append(jax.tree.map(np.asarray, count))
        masses.append(layer.mass(plan, turn))
    return {
        "keys": round(float(np.mean([c.attended for c in counts])), 1),
        "keys_read": round(float(np.mean([c.read for c in counts])), 1),
        "mass": round(float(np.mean(masses)), 5),
        "least_mass": round(float(np.min(masses)), 5),
        "error": round(float(np.mean(errors)), 5),
        "widened": int(np.sum([c.widened for c in counts])),
    }


def measure(layer: Layer, peer: PeerProcess, rounds: int, sketches: dict[str, Sketch]) -> dict:
    """Seconds of each plan and of each of the peer's variants, by turns; and the plans' worth."""
    chosen = plans(layer.planted.beta, sketches)
    if layer.graphs is None:
        del chosen["dipr_graph"]
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    theirs: dict[str, list[float]] = {}
    full = [full_attention(layer, turn) for turn in range(rounds)]
    value = {name: worth(layer, plan, full) for name, plan in chosen.items()}  # compiles, too
    for turn in range(rounds):
        for counted in (False, True):  # awake again, as the peer is when its calls count
            for name, plan in chosen.items():
                started = time.perf_counter()
                jax.block_until_ready(layer.attend(plan, turn))
                if counted:
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
        "worth": value,
        **layer.graph_facts,
    }


def crossover(rows: list[dict], name: str) -> float | None:
    """Length at which a plan's time falls below `full`'s; None: nowhere between those measured."""
    rows = [r for r in rows if name in r["times_full"]]
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
    parser.add_argument(
        "--queries", type=int, default=20, help="keys for each of the graph's; 0 for no graph"
    )
    parser.add_argument("--bits", default="4", help="of sketches, such as 4,learnt2,learnt1")
    parser.add_argument("--kv-heads", type=int, default=8, help="K, each with 4 query heads")
    parser.add_argument("--peer-python")
    options = parser.parse_args()
    sketches = {bits: real_keys.asked(bits) for bits in options.bits.split(",")}
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

        shape = {"kv_heads": options.kv_heads, "group": GROUP, "dim": DIM}
        loaded = peer.ask("load", **shape, threads=machine.cores())
        facts = machine.facts("alaya_jax", "jax", "jaxlib", "numpy")
        put({"benchmark": "decode_attention", **shape, **loaded, **facts})
        rows = []
        for n in map(int, options.lengths.split(",")):
            queries = options.queries if n >= GRAPH_FROM else 0
            data = Planted.create(n, options.kv_heads, GROUP, DIM)
            layer = Layer(data, options.rounds, queries, list(sketches.values()))
            rows.append(measure(layer, peer, options.rounds, sketches))
            put(rows[-1])
        names = [name for name in rows[-1]["ours_ms"] if name != "full"]
        put({"crossover": {name: crossover(rows, name) for name in names}})


if __name__ == "__main__":
    main()
