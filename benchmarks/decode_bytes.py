"""Bytes that one decode step moves, by the compiler's account, beside what it must read.

    python benchmarks/decode_bytes.py [--model smollm2-135m] [--context 4096]

Nothing runs and no weights are needed: the programs of a step of a known architecture are compiled
from shapes, for two sizes of the pool, and each counts as often as a step calls it; `compile_s` is
how long tracing and compiling took.
The compiler counts the body of a loop once, so the attention's tile is set to the whole context
here; and it counts the tile three times (read from the pool, written, read), though in practice a
tile stays in a core's cache. The cache is donated: a copy of it, or a read of more of it than the
context, would show as a growth with the size of the pool, as pool-sized copies in the program, or
as scratch memory that grows. Exits with 1 if there are any.

One sequence only: a scatter into the pages of several is in place too, but is counted as a read and
a write of the whole pool.
"""

import argparse
import json
import re
import sys
import time

import jax
import jax.numpy as jnp
import step_programs

from alaya_jax import configs
from alaya_jax.cache import PagedKV, PageTable, views
from alaya_jax.frame import Frame
from alaya_jax.models import LlamaConfig
from alaya_jax.models.llama import abstract_params
from alaya_jax.query import DIPR, Full, Query, Window
from alaya_jax.query.plan import Plan

PAGE = 16


def compiled_step(config: LlamaConfig, query: Query, pages: int, context: int):
    """The programs of a step for a pool of this many pages, each with its calls a step."""
    pool = (config.num_key_value_heads, pages, PAGE, config.head_dim)
    layers = (jax.ShapeDtypeStruct(pool, jnp.float32),) * config.num_hidden_layers
    entries = jax.ShapeDtypeStruct((1, context // PAGE), jnp.int32)
    table = PageTable(entries, jax.ShapeDtypeStruct((1,), jnp.int32))  # type: ignore[arg-type]
    kv = PagedKV(layers, layers)  # type: ignore[arg-type]
    params = abstract_params(config, jnp.float32)
    found = step_programs.of_a_step(params, Frame(config), kv, table, Plan(query))
    return [(program.calls, program.lowered.compile()) for program in found], pool


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", choices=configs.names())
    parser.add_argument("--context", type=int, default=4096)
    args = parser.parse_args()
    config = LlamaConfig.from_hf(configs.load(args.model))
    views.TILE_TOKENS = args.context
    weights = 4 * sum(x.size for x in jax.tree.leaves(abstract_params(config, jnp.float32)))
    if not config.tie_word_embeddings:  # of the embeddings only one row is read
        weights -= 4 * (config.vocab_size - 1) * config.hidden_size
    per_token = 4 * config.kv_width
    kv = args.context * per_token
    clean = True
    for query in (Full(), Window(), DIPR(50.0)):
        counted, scratch, copies, compile_s = [], [], 0, []
        for factor in (2, 16):
            pages = factor * args.context // PAGE
            started = time.perf_counter()
            found, pool = compiled_step(config, query, pages, args.context)
            compile_s.append(round(time.perf_counter() - started, 1))
            counted.append(sum(n * p.cost_analysis()["bytes accessed"] for n, p in found))
            scratch.append(max(p.memory_analysis().temp_size_in_bytes for _, p in found))
            shape = ",".join(map(str, pool))
            pattern = rf"= f32\[{shape}\]\S* copy\("
            copies += sum(len(re.findall(pattern, p.as_text())) for _, p in found)
        clean &= counted[0] == counted[1] and scratch[0] == scratch[1] and copies == 0
        row = {
            "benchmark": "decode_bytes",
            "model": args.model,
            "query": repr(query),
            "context": args.context,
            "weights_mb": round(weights / 1e6, 1),
            "kv_mb": round(kv / 1e6, 1),
            "bytes_accessed_mb": round(counted[0] / 1e6, 1),
            "ratio_to_weights_and_kv": round(counted[0] / (weights + kv), 3),
            "bytes_accessed_with_8x_the_pool_mb": round(counted[1] / 1e6, 1),
            "scratch_mb": round(scratch[0] / 1e6, 1),
            "pool_copies": copies,
            "compile_s": compile_s,
            "jax": jax.__version__,
        }
        print(json.dumps(row))
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
