"""One decode step of a Llama on GPUs that exist on paper: memory of each device, and collectives.

    .venv-aot/bin/python benchmarks/decode_step_aot.py [--model llama-3-8b] [--gpus 1 8]
        [--context 131072] [--batch 1] [--target h100] [--json]

Nothing runs: the program is compiled from shapes (see `make aot` for what that needs), sharded as
`aj.ShardingRules` says. Two programs: "engine" is `alaya_jax.programs.decode`, which decodes;
"paged_decode" is the model with every layer's attention answered by the `paged_decode` kernel
inside shard_map. Exits with 1 if a program does not fit the device, or gathers anything along the
vocabulary (the embedding, the logits): of those only rows and scores may travel.
"""

import argparse
import collections
import json
import re
import sys
import time
from typing import Any

from alaya_jax.pallas_kernels import targets

targets.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from alaya_jax import cache, configs, programs  # noqa: E402
from alaya_jax.cache import PagedKV, PageTable  # noqa: E402
from alaya_jax.models import LlamaConfig  # noqa: E402
from alaya_jax.models.llama import abstract_params, forward, logical_axes  # noqa: E402
from alaya_jax.pallas_kernels.paged_decode import paged_decode  # noqa: E402
from alaya_jax.query import Full  # noqa: E402
from alaya_jax.query.plan import Plan  # noqa: E402
from alaya_jax.sampler import init_sampler  # noqa: E402
from alaya_jax.sampling import Greedy  # noqa: E402
from alaya_jax.sharding import ShardingRules, tree_shardings  # noqa: E402

PAGE = 16
MEMORY = {"h100": 80e9, "b200": 180e9}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def abstract_inputs(config: LlamaConfig, mesh: Any, batch: int, context: int) -> dict[str, Any]:
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
    processors, sampler = init_sampler(Greedy(), [[0]] * batch, config.vocab_size)
    return {
        "params": params,
        "kv": PagedKV(layers, layers),
        "table": table,
        "token": jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=here),
        "running": jax.ShapeDtypeStruct((batch,), bool, sharding=here),
        "sampler": jax.tree.map(laid, sampler),
        "processors": processors,
        "number": jax.ShapeDtypeStruct((), jnp.int32, sharding=here),
        "end_ids": jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=here),
    }


def lower_engine(config: LlamaConfig, mesh: Any, x: dict[str, Any]) -> Any:
    """The program that decodes."""
    return programs.decode.lower(
        x["params"], x["kv"], x["table"], x["token"], x["running"], x["end_ids"], x["sampler"],
        x["number"], Plan(Full()), config=config, processors=x["processors"], capacity=16,
    )  # fmt: skip


def lower_paged_decode(config: LlamaConfig, mesh: Any, x: dict[str, Any]) -> Any:
    """The model with the kernel as its attention, one step, greedy."""
    by_head = PartitionSpec(None, "tensor")
    pool = PartitionSpec("tensor")

    def attend_shard(q: Any, k: Any, v: Any, pages: Any, count: Any, length: Any) -> Any:
        out = paged_decode(q, k, v, pages, count, length, implementation="mosaic_gpu").out
        return out.astype(q.dtype)

    sharded = jax.jit(  # so that it is lowered once, not once a layer
        jax.shard_map(
            attend_shard,
            mesh=mesh,
            in_specs=(by_head, pool, pool, PartitionSpec(), PartitionSpec(), PartitionSpec()),
            out_specs=by_head,
            check_vma=False,
        )
    )

    def step(params: Any, kv: PagedKV, table: PageTable, token: Any) -> Any:
        one = jnp.ones_like(table.length)
        length = table.length + 1
        count = -(-length // PAGE)[:, None]

        def attend(layer: int, q: Any, k: Any, v: Any, kv: Any) -> Any:
            kv = cache.append(kv, layer, k, v, table, one)
            pages = table.pages[:, None]
            out = sharded(q[:, 0], kv.k[layer], kv.v[layer], pages, count, length)
            return out[:, None], kv

        positions = table.length[:, None]
        logits, kv = forward(
            params, config, token[:, None], positions, attend, kv, logits_at=one * 0
        )
        return jnp.argmax(logits, axis=-1), kv, PageTable(table.pages, length)

    return jax.jit(step, donate_argnums=1).lower(x["params"], x["kv"], x["table"], x["token"])


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


PROGRAMS = {"engine": lower_engine, "paged_decode": lower_paged_decode}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3-8b", choices=configs.names())
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try it out")
    parser.add_argument("--target", default="h100", choices=targets.NAMES)
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    fields = configs.load(args.model)
    if args.layers:
        fields = {**fields, "num_hidden_layers": args.layers}
    config = LlamaConfig.from_hf(fields)
    passed = True
    for gpus in args.gpus:
        mesh = targets.mesh(args.target, data=1, tensor=gpus)
        inputs = abstract_inputs(config, mesh, args.batch, args.context)
        for name in args.programs:
            started = time.perf_counter()
            with jax.set_mesh(mesh):
                compiled = PROGRAMS[name](config, mesh, inputs).compile()
            memory = compiled.memory_analysis()
            peak = (
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
                + memory.temp_size_in_bytes
            )
            text = compiled.as_text()
            sent = collectives(text)
            row = {
                "benchmark": "decode_step_aot",
                "target": args.target,
                "gpus": gpus,
                "program": name,
                "model": args.model,
                "layers": config.num_hidden_layers,
                "batch": args.batch,
                "context": args.context,
                "arguments_gb": memory.argument_size_in_bytes / 1e9,
                "temporary_gb": memory.temp_size_in_bytes / 1e9,
                "updated_in_place_gb": memory.alias_size_in_bytes / 1e9,
                "peak_gb": peak / 1e9,
                "fits": peak < MEMORY[args.target],
                "kernels": text.count('custom_call_target="mosaic_gpu'),
                "collectives": sent,
                "gathers_vocabulary": sent.get("all-gather", {}).get("bytes", 0)
                >= config.vocab_size,
                "compile_s": round(time.perf_counter() - started, 1),
            }
            passed &= row["fits"] and not row["gathers_vocabulary"]
            print(json.dumps(row) if args.json else describe(row), flush=True)
    return 0 if passed else 1


def describe(row: dict[str, Any]) -> str:
    """A row for people."""
    told = ", ".join(
        f"{c['count']} {kind} of {c['bytes'] / c['count'] / 1024:.1f} KiB"
        for kind, c in row["collectives"].items()
    )
    return (
        f"{row['model']} ({row['layers']} layers), {row['program']}, {row['gpus']} x "
        f"{row['target']}, batch {row['batch']}, {row['context']:,} tokens: "
        f"{row['peak_gb']:.2f} GB a device (arguments {row['arguments_gb']:.2f}, of them updated "
        f"in place {row['updated_in_place_gb']:.2f}, temporary {row['temporary_gb']:.2f}); "
        f"{row['kernels']} Mosaic kernels; collectives: {told or 'none'}; "
        f"{row['compile_s']} s to compile"
    )


if __name__ == "__main__":
    sys.exit(main())
