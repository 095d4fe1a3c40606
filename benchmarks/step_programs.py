"""The compiled programs of one step of a model, from shapes alone: what the benchmarks count in."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alaya_jax import Greedy
from alaya_jax.attention.counts import Counts
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.frame import Frame
from alaya_jax.index import Indexed
from alaya_jax.query.plan import Plans
from alaya_jax.runtime import programs
from alaya_jax.runtime.programs import Fed, Going, Passed
from alaya_jax.runtime.sampling.sampler import init_sampler
from alaya_jax.runtime.stack import Stack
from alaya_jax.sharding import whole


class Program(NamedTuple):
    """One program: what it is, how often a step calls it, and `jax.stages.Lowered`."""

    name: str
    calls: int
    lowered: Any


def of_a_step(
    params: Any,
    frame: Frame,
    kv: PagedKV,
    table: PageTable,
    plans: Plans,
    indexed: Indexed | None = None,
    *,
    tokens: int = 1,
    layers_per_program: int | None = None,
) -> list[Program]:
    """The programs that a step over so many tokens of each sequence calls.

    Args:
      params, kv, table, indexed: trees of `jax.ShapeDtypeStruct`, with shardings on a mesh.
      frame, plans: as for `Stack`.
      tokens: T; with 1 the step ends with a choice of the next token, else with logits.
      layers_per_program: as for `Stack`.
    """
    c, here = frame.config, whole(frame.mesh)
    batch = table.length.shape[0]

    def some(shape: tuple[int, ...], dtype: Any = jnp.int32, place: Any = here) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    stack = Stack(params, frame, layers_per_program)
    of_counts = c.num_hidden_layers, batch, c.num_attention_heads
    by_heads = programs.by_heads(frame)
    number, mass = some(of_counts, place=by_heads), some(of_counts, jnp.float32, by_heads)
    counts = Counts(number, number, number, mass, number, mass)
    passed = Passed(some((batch, c.hidden_size), stack.dtype), some(()), counts)
    x = some((batch, tokens, c.hidden_size), stack.dtype)
    fed = Fed(some((batch, tokens)), some((batch,)), table)
    found: dict[Any, Program] = {}
    for link in stack.chain(plans, indexed).links:
        if link.key in found:
            found[link.key] = found[link.key]._replace(calls=found[link.key].calls + 1)
            continue
        lowered = programs.layers.lower(
            stack.outer, link.blocks, kv.part(*link.group), x, passed, fed, link.asked, frame=frame
        )
        found[link.key] = Program(f"{link.group.layers} layers", 1, lowered)
    if tokens > 1:
        last = programs.logits.lower(stack.outer, passed.last, frame=frame)
        return [*found.values(), Program("logits", 1, last)]
    processors, sampler = init_sampler(Greedy(), [[0]] * batch, c.vocab_size)
    sampler = jax.tree.map(lambda leaf: some(leaf.shape, leaf.dtype), sampler)
    of_each = some((batch,))
    going = Going(some((batch, 1)), some((batch,), bool), of_each, of_each, sampler)
    end = programs.end.lower(
        stack.outer,
        passed,
        going,
        some((batch, 1)),
        some((batch,), bool),
        processors=processors,
        frame=frame,
    )
    return [*found.values(), Program("end", 1, end)]
