"""How well the cost model predicts, and whether `Auto` takes the fastest plan by it.

    python benchmarks/plan_accuracy.py [--parts layer,step] [--shapes smollm2-135m,llama-3-8b]
        [--lengths 1024,4096,16384,65536,131072] [--json]

Prints tables; `--json` also adds lines to benchmarks/results/plan_accuracy.jsonl.

    layer   one layer's attention in a decode step by `engine.attend`, float32, over keys with
            planted critical sets (planted.py), by each plan that `Auto` weighs; beside it what
            `optimizer.cost` predicts from the constants measured at the start and the count of keys
            that the queries really kept. The graph (from 16,384 keys on) is built from queries of
            5% of the tokens; `visited` are the keys that its walks score, of a kv head.
            chosen: the plan of least predicted time; regret: its time over the fastest one's.
            crossover: the length from which on a plan is faster than to read every key.
    step    a whole decode step of SmolLM2-135M on texts of this repository, every layer by one
            plan, and by `Auto`; predicted from the machine and a calibration on the same texts.

Plans take turns with the same queries; the least time of each query counts, then the mean over
queries. The constants are measured in the same run, and not taken from the cache.
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import machine as facts_of
import numpy as np
from planted import Planted

import alaya_jax as aj
from alaya_jax import configs
from alaya_jax.attention import engine
from alaya_jax.cache import PageTable
from alaya_jax.cache.tables import table_width
from alaya_jax.index import Flat, Graph, GraphSpec, Sketch
from alaya_jax.index.graph.build import link, query_lists
from alaya_jax.index.memory import LayerMemory
from alaya_jax.models import LlamaConfig
from alaya_jax.optimizer import bench, machine
from alaya_jax.optimizer.calibrate import calibrate
from alaya_jax.optimizer.choice import describe
from alaya_jax.optimizer.choose import choose, options
from alaya_jax.optimizer.cost import KeysKept, Machine, Workload, cost, step_seconds, visited
from alaya_jax.query import DIPR, Full, Window
from alaya_jax.query.auto import Auto
from alaya_jax.query.plan import Plan

RESULTS = facts_of.ROOT / "benchmarks/results/plan_accuracy.jsonl"
TEXTS = ("tests/data/declaration.txt", "alaya_jax/cli/data/constitution.txt", "LICENSE")
PAGE, RECOVERY, WINDOW, GRAPH_FROM = 16, 0.95, Window(), 16_384
STEPS = (1024, 4096, 8000)


class Layer:
    """Pages, a sketch and a graph of planted keys, and queries [turns, 1, 1, H, D]."""

    def __init__(self, config: LlamaConfig, n: int, turns: int):
        heads, group, dim = config.num_key_value_heads, config.group_size, config.head_dim
        self.data = data = Planted.create(n, heads, group, dim)
        self.n, count = n, n // PAGE
        self.keys = data.keys()

        def paged(x: np.ndarray) -> jax.Array:
            return jnp.asarray(
                np.pad(x.reshape(heads, count, PAGE, dim), ((0, 0), (1, 0), (0, 0), (0, 0)))
            )

        values = np.random.default_rng(1).standard_normal(self.keys.shape, np.float32)
        self.k, self.v = paged(self.keys), paged(values)
        self.q = np.moveaxis(data.queries(turns, 2)[0], 2, 0)  # [turns, K, G, D]
        ids = np.zeros(table_width(count), np.int32)
        ids[:count] = np.arange(1, count + 1)
        self.table = PageTable(jnp.asarray(ids[None]), jnp.full(1, n - 1, jnp.int32))
        build = jax.jit(lambda layer, *args: layer.build(*args))
        empty = Sketch().create(config, count + 1, PAGE)
        self.index = {
            "Sketch": build(empty, self.k, self.v, jnp.arange(1, count + 1), jnp.full(count, PAGE))
        }
        if n >= GRAPH_FROM:
            asked = data.queries(int(0.05 * n / group), 1)[0].reshape(heads, -1, dim)
            spec = GraphSpec()
            lists = query_lists(jnp.asarray(self.keys), n, jnp.asarray(asked), spec.listed, low=128)
            self.index["Graph"] = (link(lists, n, n, spec),)

    def plans(self) -> dict[str, Plan]:
        """What `Auto` weighs; the graph with the range of alpha 0.0144."""
        asked = DIPR(recovery=RECOVERY, window=WINDOW)
        found = {"Full": Plan(Full()), "Flat": Plan(asked, Flat()), "Sketch": Plan(asked, Sketch())}
        found["Pages"] = Plan(asked, Sketch(), by="page", share="group")
        if "Graph" in self.index:
            found["Graph"] = Plan(DIPR(beta=self.data.beta, window=WINDOW), Graph())
        return found

    def attend(self, name: str, turn: int):
        """Output and counts of one step."""
        q = jnp.asarray(self.q[turn]).reshape(1, 1, -1, self.q.shape[-1])
        one, covered = jnp.ones(1, jnp.int32), jnp.full(1, self.n, jnp.int32)
        index = self.index.get("Sketch" if name == "Pages" else name)
        plan = self.plans()[name]
        memory = LayerMemory(self.k, self.v, self.table, index, covered)
        return engine.attend(plan, q, memory, one)

    def in_range(self) -> KeysKept:
        """Keys outside the window within the planted range, as a calibration counts them."""
        alone, together = [], []
        for q in self.q:
            scores = np.einsum("kgd,knd->kgn", q, self.keys)
            kept = scores >= scores.max(-1, keepdims=True) - self.data.beta
            kept[..., : WINDOW.sink] = kept[..., -WINDOW.recent :] = False
            alone.append(kept.sum(-1).mean())
            together.append(kept.any(1).sum(-1).mean())
        return KeysKept(float(np.mean(alone)), float(np.mean(together)))


def measure(layer: Layer, rounds: int) -> dict[str, dict]:
    """By plan: seconds, and what was kept."""
    names, turns = list(layer.plans()), len(layer.q)
    found = {}
    for name in names:
        counts = [jax.tree.map(np.asarray, layer.attend(name, turn)[1]) for turn in range(turns)]
        heads = (layer.k.shape[0], -1)
        read = np.mean([c.read.reshape(heads)[:, 0] for c in counts], axis=0)
        outside = np.mean([c.attended for c in counts]) - WINDOW.sink - WINDOW.recent
        found[name] = {"kept": KeysKept(max(float(outside), 0.0), float(read.max())), "read": read}
    times = {name: np.full(turns, np.inf) for name in names}
    for _, name, turn in itertools.product(range(rounds), names, range(turns)):
        started = time.perf_counter()
        jax.block_until_ready(layer.attend(name, turn))
        times[name][turn] = min(times[name][turn], time.perf_counter() - started)
    for name in names:
        found[name]["seconds"] = float(times[name].mean())
    return found


def by_layer(shape: str, known: Machine, lengths: list[int], rounds: int, put) -> None:
    """Each length and plan of one shape of layer, and the lengths of crossing."""
    config = LlamaConfig.from_hf(configs.load(shape))
    measured, predicted = {}, {}
    for n in lengths:
        layer = Layer(config, n, turns=4)
        found = measure(layer, rounds)
        work = Workload(
            config, np.dtype(np.float32), n, graph=Graph(), graph_length=n, pool_tokens=2**20
        )  # tables as wide as they come
        for name, plan in layer.plans().items():
            kept = layer.in_range() if name == "Graph" else found[name]["kept"]
            seconds, guess = found[name]["seconds"], cost(plan, work, known, kept).seconds
            measured[n, name], predicted[n, name] = seconds, guess
            row = {} if name == "Full" else {"keys": round(kept.attended), "read": round(kept.read)}
            if name == "Graph":
                row["visited"] = round(float(found[name]["read"].mean()))
                row["visited_predicted"] = round(visited(Graph(), n - 640, kept.read))
            put("layer", shape=shape, length=n, plan=name, ms=1e3 * seconds,
                predicted_ms=1e3 * guess, off=guess / seconds - 1, **row)  # fmt: skip
        took, guess = ({k[1]: v for k, v in x.items() if k[0] == n} for x in (measured, predicted))
        chosen(put, "choice", took, guess, shape=shape, length=n)
    for name in ("Flat", "Sketch", "Pages", "Graph"):
        put("crossover", shape=shape, plan=name, length=crossing(measured, lengths, name),
            predicted=crossing(predicted, lengths, name))  # fmt: skip


def chosen(put, what: str, seconds: dict, guess: dict, **row) -> None:
    """The plan of least predicted time against the fastest."""
    took, best = min(guess, key=guess.get), min(seconds, key=seconds.get)
    put(what, **row, chosen=took, fastest=best, regret=seconds[took] / seconds[best])


def crossing(seconds: dict, lengths: list[int], name: str) -> int | None:
    """Where a plan's time falls below `Full`'s for good, linear in logarithms; None: nowhere; the
    shortest length measured: there or before.
    """
    points = [
        (np.log2(n), np.log(seconds[n, "Full"] / seconds[n, name]))
        for n in lengths
        if (n, name) in seconds
    ]
    for (x0, y0), (x1, y1) in reversed(list(itertools.pairwise(points))):
        if y0 < 0 <= y1:
            return round(float(2 ** (x0 - y0 * (x1 - x0) / (y1 - y0))))
    return round(2 ** points[0][0]) if points and points[0][1] >= 0 else None


def by_step(known: Machine, rounds: int, put) -> None:
    """A decode step of a real model."""
    model = aj.load("smollm2-135m", dtype="float32", progress=False)
    tokens = model.encode("\n\n".join((facts_of.ROOT / path).read_text() for path in TEXTS))
    calibration = calibrate(model, [tokens[:8192]], length=4096, save=False, progress=False)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    auto, layers = Auto(recovery=RECOVERY), range(model.config.num_hidden_layers)
    with tempfile.TemporaryDirectory() as place:
        db = aj.DB(Path(place) / "db", model, aj.Budget(device="1.2GiB"))
        for n in STEPS:
            context = db.import_context(tokens[:n])
            work = Workload(model.config, model.dtype, n + 40, weight_bytes=weights,
                            pool_tokens=db.pool.num_pages * PAGE)  # fmt: skip
            weighed = [options(auto, work, known, calibration, layer) for layer in layers]
            plans = {name: [of[name].plan for of in weighed] for name in weighed[0]}
            guess = {
                name: sum(of[name].seconds for of in weighed) + step_seconds(work, known)
                for name in weighed[0]
            }
            choice = choose(auto, work, known, calibration)
            plans["Auto"], guess["Auto"] = [x.plan for x in choice.layers], choice.seconds
            seconds = decode(db, tokens[:n], plans, rounds)
            for name, value in seconds.items():
                put("step", length=n, plan=name, ms=1e3 * value, predicted_ms=1e3 * guess[name],
                    off=guess[name] / value - 1)  # fmt: skip
            best = min(seconds, key=seconds.get)
            regret = seconds["Auto"] / seconds[best]
            mix = sorted({describe(plan) for plan in plans["Auto"]})
            put("step choice", length=n, chosen=" and ".join(mix), fastest=best, regret=regret)
            db.remove(context)


def decode(db, tokens, plans: dict, rounds: int) -> dict[str, float]:
    """Seconds a token of each, the least of some blocks of 16."""
    found = dict.fromkeys(plans, np.inf)
    for turn, (name, plan) in itertools.product(range(rounds + 1), plans.items()):
        session, rest = db.create_session([*tokens, 5])
        with session:
            run = aj.generate(session, rest, max_new_tokens=17, attention=plan,
                              sampling=aj.Greedy(ignore_eos=True))  # fmt: skip
            for _ in run:
                pass
            if turn:  # the first compiles
                found[name] = min(found[name], run.timing.decode_s / run.timing.decode_tokens)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="layer,step")
    parser.add_argument("--shapes", default="smollm2-135m,llama-3-8b")
    parser.add_argument("--lengths", default="1024,4096,16384,65536,131072")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=bench.SECONDS,
                        help="seconds for each constant; more on a busy machine")  # fmt: skip
    parser.add_argument("--json", action="store_true", help=f"also into {RESULTS.name}")
    given = parser.parse_args()
    bench.SECONDS = given.patience
    facts = facts_of.facts("alaya_jax", "jax", "jaxlib", "numpy")

    def keep(line: dict) -> None:
        if given.json:
            with RESULTS.open("a") as file:  # line by line: a run that is cut short leaves its part
                file.write(json.dumps(line) + "\n")

    def put(result: str, **row) -> None:
        line = {name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()}
        keep({"result": result, **line})
        print(f"{result:12}", *(f"{name} {x}" for name, x in line.items()), sep="  ", flush=True)

    keep({"benchmark": "plan_accuracy", **vars(given), **facts})
    for shape in given.shapes.split(","):
        config = LlamaConfig.from_hf(configs.load(shape))
        started = time.perf_counter()
        known = machine.measure(config, np.float32, PAGE, pages=True, graph=True)
        took = time.perf_counter() - started
        constants = {f: x for f, x in dataclasses.asdict(known).items() if isinstance(x, float)}
        print("constants", *(f"{f} {x:.3g}" for f, x in constants.items()), sep="  ")
        put("machine", shape=shape, measuring_s=took)
        keep({"result": "constants", "shape": shape, **dataclasses.asdict(known)})
        if "layer" in given.parts:
            by_layer(shape, known, list(map(int, given.lengths.split(","))), given.rounds, put)
        if "step" in given.parts and shape == "smollm2-135m":
            by_step(known, given.rounds, put)


if __name__ == "__main__":
    main()
