"""What crosses a context mesh in a decode step does not grow with the context."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from alaya_jax import configs
from alaya_jax.models import LlamaConfig
from alaya_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "benchmarks" / "decode_collectives.py"
    spec = importlib.util.spec_from_file_location("decode_collectives", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_count_of_a_known_program(bench):
    """Seven sums of 5 floats, a gather of 16 shorts of each device, and a loop that data ends."""

    def program(x, n):
        x = lax.fori_loop(0, 7, lambda _, y: lax.psum(y, "context") / 2, x)
        shorts = lax.all_gather(jnp.ones(16, jnp.int16) + x[0].astype(jnp.int16), "context")
        return lax.fori_loop(0, n, lambda _, y: lax.pmax(y + shorts[0, 0], "context"), x)

    none = PartitionSpec()
    mapped = jax.shard_map(
        program, mesh=make_mesh(context=8), in_specs=(none, none), out_specs=none, check_vma=False
    )
    text = jax.jit(mapped).lower(jnp.ones(5), 3).compile().as_text()
    sent = bench.collectives(text)
    assert sent.ops == {"all-reduce": 8, "all-gather": 1}
    assert sent.bytes == {"all-reduce": 8 * 20, "all-gather": 32}
    assert sent.unbounded == 1
    assert bench.collectives(text, outer_loops=1).unbounded == 0


@pytest.mark.parametrize("plan", ["DIPR(recovery), Sketch, tail", "TopK(100), Sketch"])
def test_four_times_the_context_sends_not_a_byte_more(bench, plan):
    config = LlamaConfig.from_hf(configs.load("llama-tiny"))
    config = dataclasses.replace(config, num_hidden_layers=1)
    short, long = (
        bench.collectives(
            bench.compiled_step(config, bench.PLANS[plan], make_mesh(context=8), n, batch=1)
        )
        for n in (2048, 8192)
    )
    assert long.bytes == short.bytes
    assert long.ops == short.ops
    assert not long.unbounded
    assert sum(long.ops.values()) >= 3
    if plan.startswith("DIPR"):  # best, count, ends, 7 rounds, two merges, the window's two, counts
        assert sum(long.ops.values()) <= 16
