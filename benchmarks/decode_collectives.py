"""Bytes that cross a mesh in one decode step, by the compiler's account, at two lengths of context.

    python benchmarks/decode_collectives.py [--model llama-3-8b] [--layers 1]
        [--out benchmarks/results/decode_collectives.jsonl]

Nothing runs and no weights are needed: the step is compiled from shapes for eight devices, for
several meshes and plans, with page tables for `--context` tokens and for four times as many.
Counted are the operands of every all-reduce, all-gather and so on of the program, as one device
sends them, in loops as often as there are rounds. None may lie in a loop whose rounds are not
known: they could follow the length. Exits with 1 if one does, or if the longer context sends more.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alaya_jax import configs
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.frame import Frame
from alaya_jax.index import Indexed, Sketch
from alaya_jax.index.memory import Memory
from alaya_jax.models import LlamaConfig
from alaya_jax.models.llama import abstract_params, logical_axes
from alaya_jax.query import DIPR, Full, TopK
from alaya_jax.query.plan import Plan
from alaya_jax.runtime import programs
from alaya_jax.sharding import ShardingRules, make_mesh, tree_shardings

PAGE = 16
PLANS = {
    "Full()": Plan(Full()),
    "DIPR(beta), Sketch": Plan(DIPR(50.0), Sketch()),
    "DIPR(recovery), Sketch, tail": Plan(DIPR(recovery=0.95), Sketch(), tail=True),
    "TopK(100), Sketch": Plan(TopK(100), Sketch()),
}
MESHES = ({"data": 1, "tensor": 1, "context": 8}, {"data": 2, "tensor": 2, "context": 2})

KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
CALLS = "body|condition|to_apply|calls|true_computation|false_computation"


@dataclasses.dataclass
class Sent:
    """What one device sends in a program.

    Attributes:
      bytes, ops: by kind of collective; loops counted by their rounds.
      unbounded: collectives in loops of an unknown number of rounds, counted once.
    """

    bytes: Counter
    ops: Counter
    unbounded: int = 0


def collectives(text: str, outer_loops: int = 0) -> Sent:
    """Counts the collectives of a compiled program.

    Args:
      text: `compiled.as_text()`.
      outer_loops: nested loops of unknown length to enter without counting it as unbounded: the
        loop over decode steps.
    """
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if start:
            lines = bodies.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    sent = Sent(Counter(), Counter())

    def visit(name: str, times: int, unknown: int) -> None:
        for line in bodies[name]:
            kind = re.search(rf" ({'|'.join(KINDS)})(-start)?\(", line)
            if kind:
                result = line[: kind.start()].split(" = ", 1)[1]
                size = sum(_bytes(*shape) for shape in re.findall(r"(\w+)\[([\d,]*)\]", result))
                if kind[1] == "all-gather":  # its result is the operands of a group of devices
                    size //= _group(line)
                if kind[1] == "reduce-scatter":
                    size *= _group(line)
                sent.bytes[kind[1]] += times * size
                sent.ops[kind[1]] += times
                sent.unbounded += times * (unknown > outer_loops)
            rounds = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            is_loop = " while(" in line
            called = re.findall(rf"(?:{CALLS})=%?([\w.\-]+)", line)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += [branch.strip(" %") for branch in branches.split(",")]
            for each in called:
                inside = is_loop and not rounds
                visit(
                    each, times * int(rounds[1]) if is_loop and rounds else times, unknown + inside
                )

    visit(entry, 1, 0)
    return sent


def _bytes(dtype: str, dims: str) -> int:
    if dtype == "pred":
        return math.prod(map(int, filter(None, dims.split(","))))
    bits = re.search(r"\d+", dtype)
    assert bits, dtype
    return int(bits[0]) // 8 * math.prod(map(int, filter(None, dims.split(","))))


def _group(line: str) -> int:
    """Devices that exchange with each other."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if counted:
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    assert named, line
    sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", named[1])}
    return math.prod(sizes[name.strip()] for name in named[2].split(","))


@functools.partial(jax.jit, static_argnames=("config", "mesh", "rules"))
def _step(params, kv, table, tokens, count, plan, indexed, *, config, mesh, rules):
    frame = Frame(config, mesh=mesh, rules=rules)
    logits, memory, counts = programs.step(
        params, Memory(kv, table, indexed), tokens, count, plan, frame
    )
    return logits, memory.kv, counts


def compiled_step(config: LlamaConfig, plan: Plan, mesh: Mesh, context: int, batch: int = 2) -> str:
    """The program of one decode step over contexts of so many tokens, as text."""
    rules = ShardingRules()
    pages = rules.page_shards(mesh) * math.ceil(context / PAGE / rules.page_shards(mesh))
    pool_pages = (batch + 1) * pages

    def placed(shape: tuple[int, ...], dtype, place: NamedSharding | None):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def ints(*shape: int, pages: str | None = None):
        return placed(
            shape, jnp.int32, NamedSharding(mesh, PartitionSpec(*(None, pages)[: len(shape)]))
        )

    shapes = abstract_params(config, jnp.float32)
    places = tree_shardings(mesh, rules, logical_axes(config), shapes)
    params = jax.tree.map(lambda x, place: placed(x.shape, x.dtype, place), shapes, places)
    pool = (config.num_key_value_heads, pool_pages, PAGE, config.head_dim)
    layers = (placed(pool, jnp.float32, rules.pool(mesh)),) * config.num_hidden_layers
    indexed = None
    if plan.index is not None:
        layer = jax.eval_shape(lambda: plan.index.create(config, pool_pages, PAGE))
        layer = jax.tree.map(lambda x: placed(x.shape, x.dtype, rules.pool(mesh)), layer)
        indexed = Indexed((layer,) * config.num_hidden_layers, ints(batch))
    by_page = ints(batch, pages, pages=rules.axis("pages", mesh))
    table = PageTable(by_page, ints(batch), by_page)
    lowered = _step.lower(
        params,
        PagedKV(layers, layers),
        table,
        ints(batch, 1),
        ints(batch),
        plan,
        indexed,
        config=config,
        mesh=mesh,
        rules=rules,
    )
    return lowered.compile().as_text()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3-8b", choices=configs.names())
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = LlamaConfig.from_hf(configs.load(args.model))
    config = dataclasses.replace(config, num_hidden_layers=args.layers)
    clean, rows = True, []
    for axes in MESHES:
        mesh = make_mesh(**axes)
        for name, plan in PLANS.items():
            short, long = (
                collectives(compiled_step(config, plan, mesh, n))
                for n in (args.context, 4 * args.context)
            )
            clean &= short.bytes == long.bytes and not long.unbounded
            row = {
                "benchmark": "decode_collectives",
                "model": args.model,
                "layers": args.layers,
                "mesh": axes,
                "plan": name,
                "batch": 2,
                "context": [args.context, 4 * args.context],
                "bytes": [sum(x.bytes.values()) for x in (short, long)],
                "by_kind": dict(long.bytes),
                "collectives": dict(long.ops),
                "in_loops_of_unknown_length": long.unbounded,
                "jax": jax.__version__,
            }
            rows.append(json.dumps(row))
            print(rows[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(rows) + "\n")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
