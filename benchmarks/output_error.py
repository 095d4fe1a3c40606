"""The output's error of `DIPR(error=...)` and of `DIPR(recovery=...)` with its tail, on real keys.

    python benchmarks/output_error.py [--model smollm2-135m] [--text FILE ...] [--length 8192]
        [--errors 0.01,0.02,0.05] [--recoveries 0.9,0.95,0.98] [--bits 4|learnt2|...]

Prefills a text and asks with the last 8 queries at eight lengths up to `--length`, all layers and
heads, through the library's attention. Prints JSON lines, for each plan over all layers, over the
first, and over the others:

    keys      share of the keys outside the window that are attended to, mean
    error     |out - full| / |full|: mean, and the 99th and 99.9th percentile over heads and queries
    held      share of heads and queries with an error of at most what was asked for
    estimated mean of the errors that the plan states; `factor_needed`: what `FACTOR` would have to
              be for 99% of the true errors to be below what is stated
    at_equal_mean, at_equal_p99   keys of a recovery with this mean error, and with this 99th
              percentile: between the two nearest of those that were run, by logarithms

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
from alaya_jax.attention import engine
from alaya_jax.cache import PageTable
from alaya_jax.index.memory import LayerMemory
from alaya_jax.index.output_error import FACTOR
from alaya_jax.query import DIPR, Full, Window
from alaya_jax.query.plan import Plan

ERRORS = (0.01, 0.02, 0.05)
RECOVERIES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
LENGTHS = 8


def run(plan, q, k, v, index, n):
    """Outputs [T, H, D] of the last queries [K, G, T, D] of n tokens, and what was read."""
    heads = q.shape[0] * q.shape[1]
    table = PageTable(jnp.arange(1, k.shape[1])[None], jnp.full(1, n - q.shape[2], jnp.int32))
    covered = jnp.full(1, (n - q.shape[2]) // real.PAGE * real.PAGE, jnp.int32)
    rows = jnp.transpose(q, (2, 0, 1, 3)).reshape(1, q.shape[2], heads, -1)
    memory = LayerMemory(k, v, table, index, covered)
    out, counts = engine.attend(plan, rows, memory, jnp.full(1, q.shape[2], jnp.int32))
    return np.asarray(out[0], np.float64), jax.tree.map(lambda x: np.asarray(x)[0], counts)


class Errors:
    """Errors, keys and stated errors of plans, each [layers, queries, heads]."""

    def __init__(self, plans):
        """None yet."""
        self.plans = plans
        self.rows = {plan: [] for plan in plans}

    def add(self, q, k, v, index):
        """One layer; q: queries by length."""
        found = {plan: [] for plan in self.plans}
        outside = sum(real.WINDOW)
        for n, query in q.items():
            full, _ = run(Plan(Full()), query, k, v, None, n)
            norm = np.linalg.norm(full, axis=-1)
            for plan, rows in found.items():
                out, counts = run(plan, query, k, v, index, n)
                error = np.linalg.norm(out - full, axis=-1) / norm
                keys = (counts.attended - outside) / (n - outside)
                rows.append(np.stack([error, keys, counts.error, counts.mass]))
        for plan, rows in found.items():
            self.rows[plan].append(np.concatenate(rows, axis=1))

    def results(self):
        """A dictionary for each plan and part of the layers."""
        parts = {"all": slice(None), "first": slice(0, 1), "others": slice(1, None)}
        for part, layers in parts.items():
            of_mass = []
            for plan in self.plans:
                error, keys, stated, mass = np.stack(self.rows[plan][layers], 1)
                row = {
                    "layers": part,
                    "recovery": plan.query.recovery,
                    "asked": plan.query.error,
                    "sketch": repr(plan.index),
                    "keys": keys.mean(),
                    "error": error.mean(),
                    "error_p99": np.quantile(error, 0.99),
                    "error_p999": np.quantile(error, 0.999),
                    "error_most": error.max(),
                }
                if plan.query.error is None:
                    row["mass_stated"] = mass.mean()
                    of_mass.append((row["keys"], row["error"], row["error_p99"]))
                else:
                    row["held"] = np.mean(error <= plan.query.error)
                    row["estimated"] = stated.mean()
                    some = stated > 0
                    ratio = np.quantile(error[some] / stated[some], 0.99) if some.any() else 0
                    row["factor_needed"] = ratio * FACTOR
                    for i, name in ((1, "at_equal_mean"), (2, "at_equal_p99")):
                        row[name] = _keys_at(of_mass, i, row["error" if i == 1 else "error_p99"])
                yield {k: _round(x) for k, x in row.items()}


def _keys_at(of_mass, i, error):
    """Keys of a recovery with this error; NaN outside what was run."""
    x, y = np.log(np.asarray(sorted(of_mass, key=lambda row: row[i])))[:, [i, 0]].T
    return float(np.exp(np.interp(np.log(error), x, y, np.nan, np.nan))) if len(x) else np.nan


def _round(x):
    if isinstance(x, float | np.floating):
        return None if np.isnan(x) else float(f"{x:.4g}")
    return x


def plans(errors, recoveries, spec):
    """Those with a recovery first."""
    window = Window(*real.WINDOW)
    queries = [DIPR(recovery=p, window=window) for p in recoveries]
    queries += [DIPR(error=e, window=window) for e in errors]
    return [Plan(query, spec, tail=True) for query in queries]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text):
        return tuple(float(x) for x in text.split(","))

    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, nargs="*", metavar="FILE", help="of this repository")
    parser.add_argument("--length", type=int, default=8192, help="a multiple of 512")
    parser.add_argument("--errors", type=numbers, default=ERRORS)
    parser.add_argument("--recoveries", type=numbers, default=RECOVERIES)
    parser.add_argument("--bits", type=real.asked, default="4", help="such as 4 or learnt2")
    options = parser.parse_args()
    if options.length % real.CHUNK or options.length < real.CHUNK * (LENGTHS + 2):
        parser.error(f"--length: a multiple of {real.CHUNK}, at least {real.CHUNK * (LENGTHS + 2)}")
    model = aj.load(options.model, dtype="float32", progress=False)
    files = options.text or real.TEXTS
    lengths = [options.length - real.CHUNK * i for i in range(LENGTHS)]
    kv, queries = real.prefill(model, real.tokens_of(model, files, options.length), lengths)
    facts = machine.facts("alaya_jax", "jax", "jaxlib", "numpy")
    print(
        json.dumps(
            {
                "benchmark": "output_error",
                "model": repr(model),
                "texts": [path.name for path in files],
                "length": options.length,
                "window": real.WINDOW,
                "page_size": real.PAGE,
                "queries": real.QUERIES * LENGTHS,
                "factor": FACTOR,
                **{key: facts[key] for key in ("time", "python", "commit", "versions")},
            }
        ),
        flush=True,
    )
    spec = options.bits
    errors = Errors(plans(options.errors, options.recoveries, spec))
    bases = real.bases(spec, real.learnt_of(model), len(kv.k))
    for i, (k, v, basis) in enumerate(zip(kv.k, kv.v, bases, strict=True)):
        sketch = real.sketched(spec, model.config, k, v, basis)
        errors.add({n: q[i] for n, q in queries.items()}, k, v, sketch)
    for row in errors.results():
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
