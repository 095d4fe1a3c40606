"""How far a context that rests in 8 bits is from an exact one, on a real model.

    python benchmarks/store_dtype.py [--model smollm2-135m] [--tokens 2048] [--asked 32]

A text is stored three times: as it was computed, in int8 and in fp8. Then each is opened, and the
next `asked` tokens of the text are read one by one behind it, with full attention. Of each of them:

    kl          of the next token's distribution from the exact one, in nats
    mass        share of the attention that stays on its key, sum_j min(p_j, p'_j), of every layer
                and head, where the exact queries ask the exact keys (p) and those at rest (p')
    output      |o' - o| / |o| of the attention outputs, in the same way

The model computes in float32 on a CPU; bytes at rest are compared with that.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np

import alaya_jax as aj
from alaya_jax.at_rest import STORE_DTYPES
from alaya_jax.query.plan import Plan
from alaya_jax.runtime.programs import Fed

TEXT = Path(aj.__file__).parent / "cli" / "data" / "constitution.txt"


def compare(model: aj.Model, tokens: int, asked: int, directory: Path) -> list[dict[str, Any]]:
    """A row for each store dtype."""
    ids = np.asarray(model.tokenizer.encode(TEXT.read_text() * 8)[: tokens + asked], np.int32)
    budget = aj.Budget.for_pages(model, (4 * tokens + 1024) // 16)
    exact, rows = None, []
    for kind in (None, *STORE_DTYPES):
        with aj.DB(directory / f"{kind}", model, budget, store_dtype=kind) as db:
            context = db.import_context(ids[:tokens], progress=False)
            db._catalogue.drop(context)  # so that it is read back
            session, _ = db.create_session(ids)
            assert session.reused == [tokens]
            with session:
                logits = [
                    np.asarray(session.prefill(ids[i : i + 1])) for i in range(tokens, len(ids))
                ]
                found = np.stack(logits).reshape(asked, -1), attention(session, tokens, asked)
            if exact is None:
                exact, nbytes = found, context.nbytes
                continue
            rows.append(
                {"store_dtype": kind, "tokens": tokens, "bytes": round(context.nbytes / nbytes, 4)}
                | said(*exact, *found)
            )
    return rows


def attention(session: aj.Session, tokens: int, asked: int) -> list[tuple[np.ndarray, ...]]:
    """Of each layer queries [n, H, D] of the last tokens, and the stored keys and values."""
    batch, layers = session.batch, session.model.config.num_hidden_layers
    table = batch.pool.table(batch.sequences)
    table = type(table)(table.pages, table.length - asked)
    fed = Fed(batch.tokens[0][None, -asked:], np.full(1, asked, np.int32), table)
    stack, plan = batch.stack, Plan(aj.Full())
    chain = stack.chain(plan, stack.put(batch.cover(plan)))
    found = stack.queries(batch.pool.kv, chain, stack.put(fed), np.arange(asked, dtype=np.int32))
    q = [np.asarray(x)[0] for x in found]
    return [
        (q[layer], *(np.asarray(x)[:, :tokens] for x in session.kv(layer)))
        for layer in range(layers)
    ]


def said(logits, truth, other, layers) -> dict[str, float]:
    """How far the second pair is from the first."""
    log_p, log_q = map(log_softmax, (logits, other))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    mass, output = [], []
    for (q, k, v), (_, k2, v2) in zip(truth, layers, strict=True):
        p, p2 = weights(q, k), weights(q, k2)
        mass.append(np.minimum(p, p2).sum(-1))
        o, o2 = (np.einsum("kgns,ksd->kgnd", *x) for x in ((p, v), (p2, v2)))
        output.append(np.linalg.norm(o2 - o, axis=-1) / np.linalg.norm(o, axis=-1))
    mass, output = np.stack(mass), np.stack(output)
    figures = {
        "kl_mean": kl.mean(),
        "kl_most": kl.max(),
        "same_first": (log_p.argmax(-1) == log_q.argmax(-1)).mean(),
        "mass_mean": mass.mean(),
        "mass_least": mass.min(),
        "output_mean": output.mean(),
        "output_most": output.max(),
    }
    return {k: float(f"{x:.3g}") if x < 0.9 else round(float(x), 5) for k, x in figures.items()}


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def weights(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Of queries [n, H, D] to keys [K, S, D], [K, G, n, S]."""
    n, heads, dim = q.shape
    rows = q.reshape(n, len(k), heads // len(k), dim)
    scores = np.einsum("nkgd,ksd->kgns", rows, k) / np.sqrt(dim)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--asked", type=int, default=32)
    options = parser.parse_args()
    print(json.dumps({"benchmark": "store_dtype", **machine.facts("jax", "alaya_jax")}))
    model = aj.load(options.model, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        for row in compare(model, options.tokens, options.asked, Path(folder)):
            print(json.dumps({"model": options.model, **row}), flush=True)


if __name__ == "__main__":
    main()
