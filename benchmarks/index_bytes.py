"""How far indexes of equal bytes a key narrow down DIPR's critical keys, on keys of a real model.

    python benchmarks/index_bytes.py [--model smollm2-135m] [--text FILE] [--length 8192]
        [--every 3] [--calibration FILE] [--indexes 2,learnt1,quest16,pq16x8,...] [--json]

Prefills a text and asks with its last 8 queries, in every third layer, all heads. Critical are keys
outside the window of 128 + 512 within beta (alpha 0.0144) of the best score of all. Beside the
library's sketches (1, 2, 4 bits; learnt0.5 ... learnt4) stand indexes of other papers
(key_indexes.py). Tables, of all layers, the first and the others, a row for
each index:

    bytes     a key and kv head, all that is stored: what a page or a context shares is counted by
              its part; of a sketch also the means of values, 4.5 bytes at D 64, which the others
              do without
    99%, 99.99%   share of the keys outside the window that have to be read to have so many of the
              critical ones, taken best score first until then: by an oracle, for all alike; the
              mean over heads and queries (fewer than 10,000 critical keys: all of them)
    passes    of those that give a bound: the share of keys that the bound leaves, from the best
              score that the window or the most promising key (page) has
    recall    of critical keys among these

`--calibration` is the text that label channels are chosen from; `--json` also adds lines to
benchmarks/results/index_bytes.jsonl. Nothing is timed; ten layers take some minutes.
"""

import argparse
import json
from pathlib import Path

import key_indexes
import machine
import numpy as np
import real_keys as real

import alaya_jax as aj
from alaya_jax.models.rope import inverse_frequencies

RESULTS = machine.ROOT / "benchmarks" / "results" / "index_bytes.jsonl"
CALIBRATION, CALIBRATED = "docs/decisions.md", 4096
INDEXES = (
    "learnt0.5,pq2x6,pq8x8,rank18x16,1,learnt1,quest16,landmarks8,rank27x16,rank54x8,pq16x8,"
    "pq32x4,labels8x16,labels28x4,2,learnt2,rank78x8,labels44x4,quest8,pq32x8,labels64x4,4,learnt4"
)
SHARES = (0.99, 0.9999)


def to_find(scores, critical, share):
    """Share of keys [...] to read, best score [..., N] first, to have this share of the critical
    ones; keys of equal score are read together.
    """
    ranked = -np.sort(-np.where(critical, scores, -np.inf), axis=-1)
    count = critical.sum(-1, keepdims=True)
    last = np.maximum(np.ceil(share * count).astype(int) - 1, 0)
    cut = np.take_along_axis(ranked, last, -1)
    return np.where(count > 0, scores >= cut, False).mean(-1)


class Asked:
    """One layer's keys in pages [K, P, Z, D], queries [K, G, T, D] and what is critical to them."""

    def __init__(self, k, q, n, frequencies, weight):
        self.pool, self.q, self.n = k, q, n
        keys = np.asarray(k[:, 1 : n // real.PAGE + 1]).reshape(k.shape[0], n, k.shape[3])
        self.layer = key_indexes.Layer(keys, frequencies, weight)
        self.low, self.high = real.WINDOW[0], n - real.WINDOW[1]
        self.true = key_indexes.dot(np.asarray(q), keys)
        self.beta = float(-np.sqrt(k.shape[3]) * np.log(real.ALPHAS[0]))
        inside = np.concatenate([self.true[..., : self.low], self.true[..., self.high :]], -1)
        self.seed = inside.max(-1)
        self.outside = self.true[..., self.low : self.high]
        self.critical = self.outside >= self.true.max(-1, keepdims=True) - self.beta

    def of_sketch(self, sketch):
        """Scores and the keys that the bound leaves, of those outside the window."""
        at = self.n, self.low, self.high
        scores = np.asarray(real.scans(sketch, self.q, self.pool, *at)[2])
        passes = np.asarray(real.in_question(sketch, self.q, self.pool, *at, self.beta, self.seed))
        return scores[..., self.low : self.high], passes[..., self.low : self.high]

    def of_other(self, index):
        """The same; None for what has no bound."""
        scores = index.scores(np.asarray(self.q), self.layer)[..., self.low : self.high]
        if not isinstance(index, key_indexes.Quest):
            return scores, None
        first = scores == scores.max(-1, keepdims=True)
        best = np.maximum(self.seed, np.where(first, self.outside, -np.inf).max(-1))
        return scores, scores >= best[..., None] - self.beta

    def result(self, scores, passes):
        """By name, each [heads and queries]."""
        row = {f"read_{share:.2%}": to_find(scores, self.critical, share) for share in SHARES}
        row["critical"] = self.critical.mean(-1)
        if passes is not None:
            row["passes"] = passes.mean(-1)
            row["found"] = (passes & self.critical).mean(-1)
        return {name: x.ravel() for name, x in row.items()}


def rows(index, size, results):
    """What is said of an index, from its results by layer."""
    parts = {"all": slice(None), "first": slice(0, 1), "others": slice(1, None)}
    for part, layers in parts.items():
        chosen = results[layers]
        if chosen:
            mean = {x: float(np.mean([row[x] for row in chosen])) for x in chosen[0]}
            if "found" in mean:
                found = mean.pop("found")
                mean["recall"] = found / mean["critical"] if mean["critical"] else None
            yield {"index": index, "bytes": round(size, 2), "layers": part, **mean}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="in place of this repository's")
    parser.add_argument("--calibration", type=Path, default=machine.ROOT / CALIBRATION)
    parser.add_argument("--length", type=int, default=8192, help=f"a multiple of {real.CHUNK}")
    parser.add_argument("--every", type=int, default=3, help="of so many layers the first")
    parser.add_argument("--indexes", default=INDEXES)
    parser.add_argument("--json", action="store_true", help=f"also into {RESULTS.name}")
    options = parser.parse_args()
    n = options.length
    if n % real.CHUNK or n <= sum(real.WINDOW):
        parser.error(f"--length: a multiple of {real.CHUNK}, more than {sum(real.WINDOW)}")
    model = aj.load(options.model, dtype="float32", progress=False)
    if n > model.length_limit:
        parser.error(f"--length: {model!r} takes {model.length_limit:,} tokens")
    files = [options.text] if options.text else real.TEXTS
    kv, queries = real.prefill(model, real.tokens_of(model, files, n), [n])
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    frequencies, _ = inverse_frequencies(model.config)

    ends = range(real.CHUNK, CALIBRATED + 1, real.CHUNK)
    other, ask = real.prefill(model, real.tokens_of(model, [options.calibration], CALIBRATED), ends)
    layers = range(0, len(kv.k), options.every)
    data = []
    for i in layers:
        asked_there = np.concatenate([np.asarray(q[i]) for q in ask.values()], axis=2)
        keys = np.asarray(other.k[i][:, 1:]).reshape(heads, CALIBRATED, dim)
        weight = key_indexes.weight_of(asked_there, keys)
        data.append(Asked(kv.k[i], queries[n][i], n, frequencies, weight))

    def keep(row):
        if options.json:
            with RESULTS.open("a") as file:
                print(json.dumps(row), file=file)

    facts = machine.facts("alaya_jax", "jax", "jaxlib", "numpy")
    keep(
        {
            "benchmark": "index_bytes",
            "model": repr(model),
            "texts": [path.name for path in files],
            "calibration": options.calibration.name,
            "length": n,
            "layers": list(layers),
            "queries": real.QUERIES,
            "page_size": real.PAGE,
            "window": real.WINDOW,
            "alpha": real.ALPHAS[0],
            **{key: facts[key] for key in ("time", "python", "commit", "versions")},
        }
    )
    shares = [x.critical.mean() for x in data]
    print(
        f"{files[0].name}, {n:,} tokens; of keys outside the window critical: {np.mean(shares):.2%}"
        f", in the first layer {shares[0]:.2%}"
    )
    table = {}
    for name in options.indexes.split(","):
        if name.rstrip("0123456789x.") in ("", "learnt"):
            spec = real.asked(name)
            size = spec.page_bytes(model.config, real.PAGE, np.float32) / heads / real.PAGE
            bases = real.bases(spec, real.learnt_of(model), len(kv.k))
            sketches = (
                real.sketched(spec, model.config, kv.k[i], kv.k[i], bases[i]) for i in layers
            )
            found = (x.of_sketch(sketch) for x, sketch in zip(data, sketches, strict=True))
        else:
            spec = key_indexes.named(name)
            size = spec.bytes_a_key(heads, n, dim)
            found = (x.of_other(spec) for x in data)
        results = [x.result(*answer) for x, answer in zip(data, found, strict=True)]
        for row in rows(repr(spec), size, results):
            keep({k: round(x, 6) if isinstance(x, float) else x for k, x in row.items()})
            table.setdefault(row["layers"], []).append(row)
    for part, of_part in table.items():
        print(
            f"\n{f'layers: {part}':34}{'bytes':>6}{'99%':>10}{'99.99%':>10}{'passes':>10}", end=""
        )
        print(f"{'recall':>10}", *map(line, of_part), sep="\n")


def line(row):
    """Of the table."""
    shares = [row[f"read_{share:.2%}"] for share in SHARES] + [row.get("passes")]
    cells = [f"{row['index']:34}{row['bytes']:6.1f}"]
    cells += [f"{x:10.2%}" if x is not None else f"{'-':>10}" for x in shares]
    recall = row.get("recall")
    return "".join(cells) + (f"{recall:10.5f}" if recall is not None else f"{'-':>10}")


if __name__ == "__main__":
    main()
