"""What the sketch finds and what its estimates of mass are worth, on keys of a real model.

    python benchmarks/sketch_recall.py [--model smollm2-135m] [--lengths 2048,4096,8192]
    python benchmarks/sketch_recall.py --planted --lengths 131072 [--kv-heads 8]

Prefills texts of this repository and asks with the last queries at each length, all layers and
heads; with `--planted`, one layer of synthetic keys and queries (planted.py). Prints JSON lines:

    bound     how often a score lies outside its error bar, per side, beside what is stated; the
              mean spread of keys with the page's centre, the context's, and none
    range     DIPR through the sketch: the share of keys that are critical and that are rescored
              (of those in question), the recall of critical keys. Without a window every key goes
              through the sketch; with one, keys outside it.
    recovery  DIPR(recovery=p): keys kept, and the true share of attention mass that they hold with
              the window's; beside it the keys that the smallest fixed beta and the smallest k keep
              which hold p as often. "worst_1pct" is the mean over layers of the first percentile
              over heads and queries; "held" is the share of all of those with mass >= p, "nearly"
              of those with mass >= p - 0.01.

Nothing is timed. `--save-keys FILE` writes the keys and queries of two layers that the tests use.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import machine
import numpy as np
import real_keys as real
from planted import Planted, learnt

import alaya_jax as aj
from alaya_jax import configs
from alaya_jax.attention.kept import Kept, lse_kept
from alaya_jax.attention.softmax import share_read
from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.index import MISS, recover
from alaya_jax.index.codes import quantize
from alaya_jax.index.recovery import MARGIN
from alaya_jax.models import LlamaConfig

LEARN_TOKENS = 8192
SAVED = {"layers": (6, 20), "tokens": 1024}


@functools.partial(jax.jit, static_argnames=("n", "low", "high"))
def recovered(layer, q, k, n, low, high, lse, seed, p, margin):
    """The keys of positions low..high that DIPR(recovery=p) keeps, and the mass that it states."""
    pages = Pages(k, k, jnp.arange(1, n // real.PAGE + 1))
    keys = KeyRange(jnp.full(q.shape[2], low), jnp.full(q.shape[2], high))

    def held(mask):
        return jnp.logaddexp(lse, lse_kept(q, Kept(pages, keys, mask)))

    scan = layer.scan(q, pages, keys)
    found = recover(scan, lse, seed, p, q.shape[-1], margin, held=held)
    read = held(found.kept)
    return found.kept[..., low:high], share_read(read, found.unread)


quantize_jit = jax.jit(quantize, static_argnames="bits")


def in_window(true, n, window, dim):
    """Best score and log-sum-exp of the window, and the range outside."""
    low, high = (window[0], n - window[1]) if window else (0, n)
    scores = np.concatenate([true[..., :low], true[..., high:]], -1).astype(np.float64)
    nothing = np.full(true.shape[:-1], -np.inf, np.float32)
    if not window:
        return nothing, nothing, low, high
    lse = np.logaddexp.reduce(scores / np.sqrt(dim), -1).astype(np.float32)
    return scores.max(-1).astype(np.float32), lse, low, high


def planted(n, kv_heads):
    """A model's shape, the cache and queries of one layer, as `real_keys.prefill` has them, and
    what sketches learn of it.
    """
    data = Planted.create(n, kv_heads)
    pages = data.keys().reshape(kv_heads, -1, real.PAGE, data.dim)
    k = jnp.concatenate([jnp.zeros_like(pages[:, :1]), pages], axis=1)
    config = LlamaConfig.from_hf(configs.load("llama-3-8b"))
    heads = {"num_key_value_heads": kv_heads, "num_attention_heads": kv_heads * data.group}
    q, _ = data.queries(real.QUERIES, 2)
    config = dataclasses.replace(config, **heads)
    return config, (k,), {n: jnp.asarray(q)[None]}, learnt([data], "planted")


def learn(model, file):
    """What sketches learn from the first tokens of a text."""
    tokens = real.tokens_of(model, [file], LEARN_TOKENS)
    return aj.calibrate(model, [tokens.tolist()], save=False, progress=False).learnt


def bound(sketch, k, q, n):
    above, below, stated = [], [], (MISS, 0.05)
    spreads = {"page": 0.0, "context": 0.0, "none": 0.0}
    for layer, keys, query in zip(sketch, k, q, strict=True):
        for miss in stated:
            true, _, estimate, error = real.scans(layer, query, keys, n, 0, n, miss)
            above.append(np.mean(true > estimate + error))
            below.append(np.mean(true < estimate - error))
        held = slice(1, n // real.PAGE + 1)
        tokens = keys[:, held]
        mean = jnp.mean(tokens, (1, 2), keepdims=True)
        spreads["page"] += float(jnp.mean(layer.spread[:, held].astype(jnp.float32)))
        if layer.basis is None:
            spreads["context"] += float(jnp.mean(quantize_jit(tokens - mean, layer.bits)[2]))
            spreads["none"] += float(jnp.mean(quantize_jit(tokens, layer.bits)[2]))
    for i, miss in enumerate(stated):
        yield {
            "stated": miss,
            "above": float(np.mean(above[i :: len(stated)])),
            "below": float(np.mean(below[i :: len(stated)])),
            **{f"spread_{name}": round(x / len(k), 4) for name, x in spreads.items()},
        }


def ranges(sketch, k, q, n):
    for alpha in real.ALPHAS:
        beta = -np.sqrt(q.shape[-1]) * np.log(alpha)
        for window in (None, real.WINDOW):
            critical = rescored = missed = visible = 0
            for layer, keys, query in zip(sketch, k, q, strict=True):
                true = np.asarray(real.scans(layer, query, keys, n, 0, n)[0])
                seed, _, low, high = in_window(true, n, window, q.shape[-1])
                asked = real.in_question(layer, query, keys, n, low, high, beta, seed)
                found = np.asarray(asked)[..., low:high]
                wanted = true[..., low:high] >= true.max(-1, keepdims=True) - beta
                critical += wanted.sum()
                rescored += found.sum()
                missed += (wanted & ~found).sum()
                visible += wanted.size
            yield {
                "alpha": alpha,
                "beta": round(float(beta), 2),
                "window": window,
                "critical": round(critical / visible, 5),
                "rescored": round(rescored / visible, 5),
                "rescored_per_critical": round(rescored / critical, 3),
                "recall": round(1 - missed / critical, 7),
                "missed": int(missed),
                "of_critical_keys": int(critical),
            }


def recoveries(sketch, k, q, n):
    for window in (None, real.WINDOW):
        layers = [
            Truth.of(layer, query, keys, n, window)
            for layer, keys, query in zip(sketch, k, q, strict=True)
        ]
        for p in (0.90, 0.95, 0.98):
            for margin in (0.0, MARGIN):
                yield {"window": window, **recovery(layers, p, margin)}


@dataclasses.dataclass
class Truth:
    """One layer's heads and queries [K, G, T, keys outside the window], and the window's part.

    `recovered` takes p and the margin; `share` is each key's attention weight, `inside` the
    window's; `below` how far each score lies under the best of all, ascending, and `held` the mass
    of the window and the keys up to it.
    """

    recovered: Callable[[float, float], tuple[jax.Array, jax.Array]]
    share: np.ndarray
    inside: np.ndarray
    below: np.ndarray
    held: np.ndarray

    @classmethod
    def of(cls, layer, q, k, n, window):
        dim = q.shape[-1]
        true = np.asarray(real.scans(layer, q, k, n, 0, n)[0])
        seed, lse, low, high = in_window(true, n, window, dim)
        below = true.max(-1, keepdims=True) - true
        share = np.exp(-below / np.sqrt(dim), dtype=np.float64)
        share /= share.sum(-1, keepdims=True)
        inside = 1 - share[..., low:high].sum(-1)
        order = np.argsort(below[..., low:high], -1)
        share = share[..., low:high]
        held = inside[..., None] + np.cumsum(np.take_along_axis(share, order, -1), -1)
        below = np.take_along_axis(below[..., low:high], order, -1)
        asked = functools.partial(recovered, layer, q, k, n, low, high, lse, seed)
        return cls(asked, share, inside, below, held)


def recovery(layers, p, margin):
    kept, mass, believed, needed_beta, needed_keys = [], [], [], [], []
    for truth in layers:
        chosen, stated = map(np.asarray, truth.recovered(p, margin))
        kept.append(chosen.mean())
        mass.append((truth.inside + np.where(chosen, truth.share, 0).sum(-1)).ravel())
        believed.append(stated.ravel())
        # What a fixed beta or k would have to be, head by head and query by query.
        last = np.minimum((truth.held < p).sum(-1, keepdims=True), truth.held.shape[-1] - 1)
        needed = np.take_along_axis(truth.below, last, -1)[..., 0]
        needed_beta.append(np.where(truth.inside >= p, 0.0, needed).ravel())
        needed_keys.append(np.where(truth.inside >= p, 0, last[..., 0] + 1).ravel())
    pooled = np.concatenate(mass)
    as_often = {"q": np.mean(pooled >= p), "method": "higher"}
    beta = np.quantile(np.concatenate(needed_beta), **as_often)
    keys = np.quantile(np.concatenate(needed_keys), **as_often)
    return {
        "recovery": p,
        "margin": margin,
        "kept": round(float(np.mean(kept)), 5),
        "mass": round(float(pooled.mean()), 4),
        "worst_1pct": round(float(np.mean([np.quantile(m, 0.01) for m in mass])), 4),
        "worst_1pct_pooled": round(float(np.quantile(pooled, 0.01)), 4),
        "held": round(float(as_often["q"]), 4),
        "nearly": round(float(np.mean(pooled >= p - 0.01)), 4),
        "least": round(float(pooled.min()), 4),
        "mass_stated": round(float(np.mean(np.concatenate(believed))), 4),
        "stated_above": round(float(np.mean(np.concatenate(believed) > pooled + 1e-4)), 4),
        "fixed_beta": round(float(beta), 1),
        "kept_by_fixed_beta": round(float(np.mean([np.mean(t.below <= beta) for t in layers])), 5),
        "kept_by_fixed_k": round(float(keys) / layers[0].held.shape[-1], 5),
    }


def save_keys(path, k, q):
    n = SAVED["tokens"]
    layers = list(SAVED["layers"])
    np.savez_compressed(
        path,
        k=np.stack([np.asarray(k[i][:, 1 : n // real.PAGE + 1], np.float16) for i in layers]),
        q=np.stack([np.asarray(q[n][i], np.float16) for i in layers]),
    )
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", default="2048,4096,8192", help="multiples of 512")
    parser.add_argument("--bits", default="4,2,8", help="such as 4,2,learnt1,learnt1.5")
    parser.add_argument("--every", type=int, default=1, help="of so many layers the first")
    parser.add_argument("--text", type=Path, help="in place of this repository's")
    parser.add_argument("--calibration", type=Path, help="learn the basis from it")
    parser.add_argument("--save-keys", type=Path, metavar="FILE")
    parser.add_argument("--yarn", type=float, help="stretch RoPE by this factor")
    parser.add_argument("--planted", action="store_true", help="synthetic keys of one layer")
    parser.add_argument("--kv-heads", type=int, default=8, help="of the synthetic layer")
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",")]
    if options.save_keys:
        lengths = [SAVED["tokens"]]
    if any(n % real.CHUNK for n in lengths):
        parser.error(f"--lengths: multiples of {real.CHUNK}")
    if options.planted:
        if len(lengths) > 1:
            parser.error("--planted: one length at a time")
        config, k, queries, found = planted(lengths[0], options.kv_heads)
        source = {"planted": {"kv_heads": options.kv_heads, "head_dim": config.head_dim}}
    else:
        model = aj.load(options.model, dtype="float32", progress=False)
        if options.yarn:
            model = real.stretched(model, options.yarn)
        texts = [options.text] if options.text else real.TEXTS
        if max(lengths) > model.length_limit:
            parser.error(f"--lengths: {model!r} takes {model.length_limit:,} tokens")
        found = learn(model, options.calibration) if options.calibration else real.learnt_of(model)
        kv, queries = real.prefill(model, real.tokens_of(model, texts, max(lengths)), lengths)
        config, k = model.config, kv.k
        source = {
            "model": repr(model),
            "yarn": options.yarn,
            "texts": [x.name for x in texts],
            "basis": str(found),
        }
        if options.save_keys:
            save_keys(options.save_keys, k, queries)
            return
    layers = range(0, len(k), options.every)
    facts = machine.facts("alaya_jax", "jax", "jaxlib", "numpy")
    print(
        json.dumps(
            {
                "benchmark": "sketch_recall",
                **source,
                "queries": real.QUERIES,
                "page_size": real.PAGE,
                "miss": MISS,
                "layers": list(layers),
                **{key: facts[key] for key in ("time", "python", "commit", "versions")},
            }
        )
    )
    keys = [k[i] for i in layers]
    for spec in map(real.asked, options.bits.split(",")):
        bases = real.bases(spec, found, len(k))
        sketch = [real.sketched(spec, config, k[i], k[i], bases[i]) for i in layers]
        for n in lengths:
            for what in (bound, ranges, recoveries):
                name = {"ranges": "range", "recoveries": "recovery"}.get(what.__name__, "bound")
                for row in what(sketch, keys, queries[n][:: options.every], n):
                    print(
                        json.dumps({"result": name, "sketch": repr(spec), "context": n, **row}),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
