"""Policies of sparse attention on keys of a real model, under equal keys read.

    python benchmarks/policies.py [--model smollm2-135m] [--lengths 2048,4096,8192] [--keys 0.05]
    python benchmarks/policies.py --lengths 32768 --yarn 4     # RoPE stretched to 32K

Prefills texts of this repository (again from the start where they are too short) and asks with the
last queries at each length. Every policy of `alaya_jax.policies` keeps, in the mean over heads and
the layers that it makes sparse, about the same share of the keys outside the window: k is set, a
fixed beta and a recovery are found by halving. The window of all is [128 + 512], so that only what
is retrieved differs; StreamingLLM's is longer by the share.

Policies that search a graph are answered by scoring every key here: what a perfect graph would give
(benchmarks/graph_recall.py says what a real one does). InfLLM's and Quest's blocks are pages of 16.

JSON lines, a policy each, into benchmarks/results/policies.jsonl:
    keys          keys attended to outside the window, share of those there are
    mass          true share of the attention mass, mean; "worst_1pct": the first percentile
    error         |out - full| / |full|, mean; "error_p99"

Nothing is timed.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import numpy as np
import real_keys as real

import alaya_jax as aj
from alaya_jax import policies
from alaya_jax.attention import engine
from alaya_jax.cache import PageTable
from alaya_jax.explain.truth import truth
from alaya_jax.index import Flat
from alaya_jax.index.memory import LayerMemory
from alaya_jax.query import Full, Window
from alaya_jax.query.plan import Plan, of_layer, plan_for

RESULTS = Path(__file__).resolve().parent / "results" / "policies.jsonl"
WINDOW = Window(128, 512)
HALVINGS = 7


class Layers:
    """Pages of all layers of one context, its last queries, and the indexes that plans ask for."""

    def __init__(self, config, kv, queries, n):
        self.config, self.kv, self.queries, self.n = config, kv, queries, n
        self.ids = jnp.arange(1, n // real.PAGE + 1)
        self.table = PageTable(self.ids[None], jnp.full(1, n - real.QUERIES, jnp.int32))
        self.covered = (n - real.QUERIES) // real.PAGE * real.PAGE
        self.indexes = {}

    def index(self, plan, layer):
        spec = plan.index
        if spec is None or isinstance(spec, Flat):
            return None
        if (spec, layer) not in self.indexes:
            empty = spec.create(self.config, len(self.ids) + 1, real.PAGE, jnp.float32)
            self.indexes[spec, layer] = build(
                empty,
                self.kv.k[layer],
                self.kv.v[layer],
                self.ids,
                jnp.full(len(self.ids), real.PAGE),
            )
        return self.indexes[spec, layer]

    def attend(self, plan, layer):
        """Output [T, H, D], keys attended to [T, H]."""
        q = self.queries[layer]  # [K, G, T, D]
        q = jnp.moveaxis(q, 2, 0).reshape(1, real.QUERIES, -1, q.shape[-1])
        index, covered = self.index(plan, layer), jnp.full(1, self.covered, jnp.int32)
        memory = LayerMemory(self.kv.k[layer], self.kv.v[layer], self.table, index, covered)
        out, counts = engine.attend(plan, q, memory, jnp.full(1, real.QUERIES, jnp.int32))
        return np.asarray(out[0]), np.asarray(counts.attended[0])

    def mass(self, plan, layer):
        """True share of the mass of the keys attended to, [T, H]."""
        q = self.queries[layer]
        rows = jnp.moveaxis(q, 2, 0).reshape(real.QUERIES, -1, q.shape[-1])
        pages = (self.kv.k[layer], self.kv.v[layer], self.ids, None)
        return np.stack(
            [
                truth(
                    plan,
                    row,
                    pages,
                    jnp.int32(self.n - real.QUERIES + 1 + i),
                    self.index(plan, layer),
                    jnp.int32(self.covered),
                    jnp.float32(0.95),
                ).recovery
                for i, row in enumerate(rows)
            ]
        )

    @property
    def outside(self):
        return self.n - WINDOW.sink - WINDOW.recent

    def share(self, plans, layers):
        """Keys attended to outside [128 + 512], as a share of those there are."""
        window = WINDOW.sink + WINDOW.recent
        kept = [self.attend(of_layer(plans, i), i)[1].mean() - window for i in layers]
        return float(np.mean(kept)) / self.outside


build = jax.jit(lambda index, *args: index.build(*args))


def sparse_layers(plans, layers):
    return [i for i in range(layers) if not isinstance(of_layer(plans, i).query, Full)]


def found_by_halving(layers, make, low, high, share, some):
    """The number between `low` (keeps fewer) and `high` whose plans keep `share` of the keys."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if layers.share(make(middle), some) < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def configurations(layers, share):
    """Name -> plans that keep about that share."""
    config, count = layers.config, layers.config.num_hidden_layers
    k = max(real.PAGE, round(share * layers.outside))
    some = list(range(count))

    def plans(attention):
        return plan_for(attention, config, layers.n)

    def alayadb(beta):
        return plans(policies.get("alayadb")(config, beta=beta, index=Flat()))

    def recovery(p, tail=False):
        return plans(policies.get("recovery")(config, recovery=p, tail=tail))

    beta = found_by_halving(layers, alayadb, 0.0, 200.0, share, some)
    p = found_by_halving(layers, recovery, 0.3, 0.999, share, some)
    get = policies.get
    yield "full", plans(Full()), {}
    yield "streaming_llm", plans(get("streaming_llm")(config, k)), {"recent": 512 + k}
    yield "infllm", plans(get("infllm")(config, k, recent=512)), {"k": k}
    yield "quest", plans(get("quest")(config, k)), {"k": k}
    yield (
        "retrieval_attention",
        plans(get("retrieval_attention")(config, k, index=Flat())),
        {"k": k},
    )
    yield "alayadb", alayadb(beta), {"beta": round(beta, 2)}
    yield "recovery", recovery(p), {"recovery": round(p, 4)}
    yield "recovery, tail", recovery(p, tail=True), {"recovery": round(p, 4)}


def judge(layers, plans):
    """What stands in a line."""
    some = sparse_layers(plans, layers.config.num_hidden_layers) or [0]
    errors, masses = [], []
    for layer in range(layers.config.num_hidden_layers):
        plan = of_layer(plans, layer)
        full, _ = layers.attend(Plan(Full()), layer)
        out, _ = layers.attend(plan, layer)
        errors.append(np.linalg.norm(out - full, axis=-1) / np.linalg.norm(full, axis=-1))
        masses.append(layers.mass(plan, layer))
    errors, masses = np.concatenate(errors).ravel(), np.concatenate(masses).ravel()
    return {
        "keys": round(layers.share(plans, some), 4),
        "sparse_layers": len(some),
        "mass": round(float(masses.mean()), 4),
        "worst_1pct": round(float(np.quantile(masses, 0.01)), 4),
        "error": round(float(errors.mean()), 4),
        "error_p99": round(float(np.quantile(errors, 0.99)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", default="2048,4096,8192", help=f"multiples of {real.CHUNK}")
    parser.add_argument("--keys", default="0.02,0.05,0.1", help="shares of the keys")
    parser.add_argument("--yarn", type=float, help="stretch RoPE by this factor")
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",")]
    model = aj.load(options.model, dtype="float32", progress=False)
    if options.yarn:
        model = real.stretched(model, options.yarn)
    config = model.config
    tokens = real.tokens_of(model, real.TEXTS, max(lengths))
    kv, queries = real.prefill(model, tokens, lengths)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:

        def put(row):
            print(json.dumps(row), flush=True)
            file.write(json.dumps(row) + "\n")

        facts = machine.facts("alaya_jax", "jax", "jaxlib", "numpy")
        put({"benchmark": "policies", "model": repr(model), "yarn": options.yarn, **facts})
        for n in lengths:
            layers = Layers(config, kv, queries[n], n)
            for share in map(float, options.keys.split(",")):
                for name, plans, settings in configurations(layers, share):
                    row = judge(layers, plans)
                    put({"context": n, "asked": share, "policy": name, **settings, **row})


if __name__ == "__main__":
    main()
