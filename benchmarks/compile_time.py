"""How long the programs of a model take to make ready: tracing, lowering and compiling, by layers.

    python benchmarks/compile_time.py [--layers 16 32 80] [--width 8] [--json]
    .venv-aot/bin/python benchmarks/compile_time.py --target h100

A step of decoding (DIPR through the sketch) and a chunk of a prefill (Full), from shapes: nothing
runs. On the CPU the model is a Llama 3 8B whose widths are divided by `--width` (with layers of
full width the compiler does the same work); for a GPU that exists on paper it has its own widths.
"groups" is how a session compiles; "one program" is what it did before: all layers in one, as
`aj.load(..., layers_per_program=...)` does with the number of layers. Wall seconds and CPU seconds
of this process; no program is read from a cache.
"""

import argparse
import json
import sys
import time
from typing import Any

TARGETS = ("cpu", "h100", "b200")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32, 80])
    parser.add_argument("--width", type=int, default=8, help="divides the widths, on a CPU")
    parser.add_argument("--target", default="cpu", choices=TARGETS)
    parser.add_argument("--ways", nargs="+", default=["groups", "one program"])
    parser.add_argument("--steps", nargs="+", default=["decode", "prefill"])
    return parser.parse_args()


def main() -> int:
    args = arguments()
    from alaya_jax.pallas_kernels import targets

    if args.target != "cpu":
        targets.prepare()
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    import contextlib

    import jax.numpy as jnp
    import machine
    import step_programs
    from jax.sharding import NamedSharding, PartitionSpec

    from alaya_jax import DIPR, Full, Sketch, configs
    from alaya_jax.cache import PagedKV, PageTable
    from alaya_jax.frame import Frame
    from alaya_jax.index import Indexed
    from alaya_jax.models import LlamaConfig
    from alaya_jax.models.llama import abstract_params
    from alaya_jax.query.plan import Plan

    paper = args.target != "cpu"
    mesh = targets.mesh(args.target, data=1, tensor=1) if paper else None
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    dtype = jnp.bfloat16 if paper else jnp.float32

    def some(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def inputs(layers: int, step: str) -> tuple[Any, ...]:
        fields = {**configs.load("llama-3-8b"), "num_hidden_layers": layers}
        if not paper:
            for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
                fields[name] //= args.width
            fields["num_key_value_heads"] = max(1, fields["num_key_value_heads"] // args.width)
        config = LlamaConfig.from_hf(fields)
        pages, page = 2048, 16
        shape = config.num_key_value_heads, pages, page, config.head_dim
        pool: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        kv = PagedKV((pool,) * layers, (pool,) * layers)
        entries = jax.ShapeDtypeStruct((1, 512), jnp.int32, sharding=place)
        table = PageTable(entries, jax.ShapeDtypeStruct((1,), jnp.int32, sharding=place))
        params = jax.tree.map(some, abstract_params(config, dtype))
        plan, indexed = Plan(Full()), None
        if step == "decode":
            plan = Plan(DIPR(beta=50.0), Sketch())
            index = jax.eval_shape(lambda: Sketch().create(config, pages, page, dtype))
            indexed = Indexed((jax.tree.map(some, index),) * layers, table.length)
        return params, Frame(config, mesh=mesh), kv, table, plan, indexed

    print(json.dumps({"benchmark": "compile_time", **machine.facts("alaya_jax")}), flush=True)
    for layers in args.layers:
        for step in args.steps:
            for way in args.ways:
                jax.clear_caches()
                given = inputs(layers, step)
                wall, cpu = time.perf_counter(), time.process_time()
                with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                    found = step_programs.of_a_step(
                        *given,
                        tokens=1 if step == "decode" else 512,
                        layers_per_program=None if way == "groups" else layers,
                    )
                    lowered = time.perf_counter() - wall
                    for program in found:
                        program.lowered.compile()
                row = {
                    "what": step,
                    "way": way,
                    "layers": layers,
                    "target": args.target,
                    "width": 1 if paper else args.width,
                    "programs": len(found),
                    "calls": sum(program.calls for program in found),
                    "trace_and_lower_s": round(lowered, 2),
                    "wall_s": round(time.perf_counter() - wall, 2),
                    "cpu_s": round(time.process_time() - cpu, 2),
                }
                print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
