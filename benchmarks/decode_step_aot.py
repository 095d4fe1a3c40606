"""A step of a Llama on GPUs that exist on paper: memory of each device, kernels, and collectives.

    .venv-aot/bin/python benchmarks/decode_step_aot.py [--model llama-3-8b] [--gpus 1 8]
        [--context 131072] [--batch 1] [--tokens 1] [--attention full dipr recovery pages tiles]
        [--target h100] [--json]

Nothing runs: the programs of a step are compiled from shapes (see `make aot` for what that needs),
each counted as often as the step calls it, sharded as `aj.ShardingRules` says, with the attention
asked for: "full", "dipr" (beta 50 through the sketch),
"recovery" (0.95 through the sketch, by key: the scan is XLA's) or "pages" (the same by page: the
scan is a kernel's); with `--tokens 512`, a chunk of a prefill, "full" or "tiles". Exits with 1 if
the engine does not take the kernels there, if a program does not fit the device, or if it gathers
anything along the vocabulary (the embedding, the logits): of those only rows and scores may travel.
"""

import argparse
import collections
import json
import math
import re
import sys
import time
from typing import Any

from alaya_jax.pallas_kernels import targets

targets.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import step_programs  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402
from step_programs import Program  # noqa: E402

from alaya_jax import configs  # noqa: E402
from alaya_jax.cache import PagedKV, PageTable  # noqa: E402
from alaya_jax.frame import Frame  # noqa: E402
from alaya_jax.index import Indexed, Sketch  # noqa: E402
from alaya_jax.models import LlamaConfig  # noqa: E402
from alaya_jax.models.llama import abstract_params, logical_axes  # noqa: E402
from alaya_jax.query import DIPR, Full, Tiles  # noqa: E402
from alaya_jax.query.plan import Plan  # noqa: E402
from alaya_jax.sharding import ShardingRules, tree_shardings  # noqa: E402

PAGE = 16
ATTENTION = ("full", "dipr", "recovery", "pages")
CHUNK_ATTENTION = ("full", "tiles")
MEMORY = {"h100": 80e9, "b200": 180e9}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def abstract_inputs(
    config: LlamaConfig, mesh: Any, batch: int, context: int, tokens: int
) -> dict[str, Any]:
    """Parameters in bf16, a pool for the batch, and the small arrays of a step, laid on a mesh."""
    rules = ShardingRules()
    here = NamedSharding(mesh, PartitionSpec())

    def laid(x: Any, sharding: Any = here) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = abstract_params(config, jnp.bfloat16)
    params = jax.tree.map(laid, params, tree_shardings(mesh, rules, logical_axes(config), params))
    shape = (config.num_key_value_heads, batch * context // PAGE + 1, PAGE, config.head_dim)
    by_head = rules.sharding(mesh, ("kv_heads", None, None, "head_dim"), shape)
    pool = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=by_head)
    layers = (pool,) * config.num_hidden_layers
    table = PageTable(
        jax.ShapeDtypeStruct((batch, context // PAGE), jnp.int32, sharding=here),
        jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=here),
    )
    return {"params": params, "kv": PagedKV(layers, layers), "table": table, "tokens": tokens}


def plan_of(name: str) -> Plan:
    """What `--attention` means."""
    plans = {
        "full": Plan(Full()),
        "dipr": Plan(DIPR(beta=50.0), Sketch()),
        "recovery": Plan(DIPR(recovery=0.95), Sketch()),
        "pages": Plan(DIPR(recovery=0.95), Sketch(), by="page", share="group"),
        "tiles": Plan(Tiles(recovery=0.9, kv_block=128)),
    }
    return plans[name]


def lower(
    config: LlamaConfig, mesh: Any, x: dict[str, Any], plan: Plan, layers_per_program: int | None
) -> list[Program]:
    """The programs of a step, as a session calls them."""
    indexed = indexed_inputs(config, mesh, x, plan)
    return step_programs.of_a_step(
        x["params"], Frame(config, mesh=mesh), x["kv"], x["table"], plan, indexed,
        tokens=x["tokens"], layers_per_program=layers_per_program,
    )  # fmt: skip


def bytes_of_a_device(tree: Any) -> int:
    """What a tree of shapes takes on each device of its mesh."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def indexed_inputs(config: LlamaConfig, mesh: Any, x: dict[str, Any], plan: Plan) -> Indexed | None:
    """The plan's index over the pool, in every layer."""
    if plan.index is None:
        return None
    pool = x["kv"].k[0]
    pages = pool.shape[1]

    def laid(leaf: Any) -> jax.ShapeDtypeStruct:
        axes = ("kv_heads", *(None,) * (leaf.ndim - 1))
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=ShardingRules().sharding(mesh, axes, leaf.shape)
        )

    layer = jax.eval_shape(lambda: plan.index.create(config, pages, PAGE, pool.dtype))
    layer = jax.tree.map(laid, layer)
    return Indexed((layer,) * config.num_hidden_layers, x["table"].length)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """How many of each kind a program holds, and the bytes of their results."""
    width = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "pred": 1}
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    kinds = "|".join(COLLECTIVES)
    for result, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", text):
        sizes = re.findall(r"(\w+)\[([\d,]*)\]", result)
        dtype, shape = sizes[-1]  # of a start, the last is the result
        number = 1
        for size in filter(None, shape.split(",")):
            number *= int(size)
        found[kind]["count"] += 1
        found[kind]["bytes"] += number * width.get(dtype, 4)
    return dict(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3-8b", choices=configs.names())
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers-per-program", type=int, help="see `aj.load`")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try it out")
    parser.add_argument("--target", default="h100", choices=targets.NAMES)
    parser.add_argument("--tokens", type=int, default=1, help="new tokens of each sequence")
    parser.add_argument("--attention", nargs="+", choices=(*ATTENTION, "tiles"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    fields = configs.load(args.model)
    if args.layers:
        fields = {**fields, "num_hidden_layers": args.layers}
    config = LlamaConfig.from_hf(fields)
    passed = True
    for gpus in args.gpus:
        mesh = targets.mesh(args.target, data=1, tensor=gpus)
        inputs = abstract_inputs(config, mesh, args.batch, args.context, args.tokens)
        for name in args.attention or (ATTENTION if args.tokens == 1 else CHUNK_ATTENTION):
            started = time.perf_counter()
            plan = plan_of(name)
            with jax.set_mesh(mesh):
                found = lower(config, mesh, inputs, plan, args.layers_per_program)
                compiled = [(p.calls, p.lowered.compile()) for p in found]
            held = bytes_of_a_device([inputs["params"], inputs["kv"]])
            held += bytes_of_a_device(indexed_inputs(config, mesh, inputs, plan))
            memory = [(calls, program.memory_analysis()) for calls, program in compiled]
            scratch = max(m.temp_size_in_bytes for _, m in memory)
            in_place = sum(calls * m.alias_size_in_bytes for calls, m in memory)
            peak = (
                held
                + scratch
                + max(m.output_size_in_bytes - m.alias_size_in_bytes for _, m in memory)
            )
            sent: dict[str, dict[str, int]] = {}
            for calls, program in compiled:
                for kind, found_here in collectives(program.as_text()).items():
                    total = sent.setdefault(kind, {"count": 0, "bytes": 0})
                    for key, value in found_here.items():
                        total[key] += calls * value
            kernels = sum(
                calls * program.as_text().count('custom_call_target="mosaic_gpu')
                for calls, program in compiled
            )
            row = {
                "benchmark": "decode_step_aot",
                "target": args.target,
                "gpus": gpus,
                "attention": name,
                "tokens": args.tokens,
                "model": args.model,
                "layers": config.num_hidden_layers,
                "batch": args.batch,
                "context": args.context,
                "arguments_gb": held / 1e9,
                "temporary_gb": scratch / 1e9,
                "updated_in_place_gb": in_place / 1e9,
                "peak_gb": peak / 1e9,
                "fits": peak < MEMORY[args.target],
                "programs": len(compiled),
                "kernels": kernels,
                "collectives": sent,
                "gathers_vocabulary": sent.get("all-gather", {}).get("bytes", 0)
                >= config.vocab_size,
                "compile_s": round(time.perf_counter() - started, 1),
            }
            passed &= row["fits"] and row["kernels"] > 0 and not row["gathers_vocabulary"]
            print(json.dumps(row) if args.json else describe(row), flush=True)
    return 0 if passed else 1


def describe(row: dict[str, Any]) -> str:
    """A row for people."""
    told = ", ".join(
        f"{c['count']} {kind} of {c['bytes'] / c['count'] / 1024:.1f} KiB"
        for kind, c in row["collectives"].items()
    )
    return (
        f"{row['model']} ({row['layers']} layers), {row['attention']}, {row['tokens']} new tokens, "
        f"{row['gpus']} x "
        f"{row['target']}, batch {row['batch']}, {row['context']:,} tokens: "
        f"{row['peak_gb']:.2f} GB a device (arguments {row['arguments_gb']:.2f}, of them updated "
        f"in place {row['updated_in_place_gb']:.2f}, temporary {row['temporary_gb']:.2f}); "
        f"{row['kernels']} Mosaic kernels; collectives: {told or 'none'}; "
        f"{row['compile_s']} s to compile"
    )


if __name__ == "__main__":
    sys.exit(main())
