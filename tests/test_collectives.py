"""What crosses a context mesh in a decode step does not grow with the context."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from alaya_jax import configs
from alaya_jax.models import LlamaConfig, llama
from alaya_jax.models.quantized import QuantizedMatrix
from alaya_jax.runtime.sampling.params import Sampling
from alaya_jax.runtime.sampling.sampler import init_sampler, sample
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


@pytest.mark.parametrize(
    "plan",
    ["DIPR(recovery), Sketch, tail", pytest.param("TopK(100), Sketch", marks=pytest.mark.slow)],
)
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
    if plan.startswith("DIPR"):  # best, count, ends; two looks of four rounds, two in between and
        # two exact; the merge, the window's two, counts
        assert sum(long.ops.values()) <= 17


def test_a_step_of_one_sequence_sends_rows_of_the_vocabulary_not_the_table(bench):
    config = LlamaConfig.from_hf(configs.load("llama-tiny"))
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = dataclasses.replace(config, num_hidden_layers=1, **heads)
    plan = bench.PLANS["Full()"]
    sent = bench.collectives(bench.compiled_step(config, plan, make_mesh(tensor=8), 64, batch=1))
    assert set(sent.bytes) == {"all-reduce"}  # of the looked-up row, attention and MLP
    row = 4 * config.hidden_size
    assert 3 * row <= sent.bytes["all-reduce"] <= 4 * row < config.vocab_size * row // 8


@pytest.mark.parametrize("kept", ["float32", "int8"])
def test_no_lookup_in_the_vocabulary_is_of_a_single_row(kept):
    """For GPUs, XLA rewrites such a gather as a slice, and sends the whole table around for it.

    What is compiled for a CPU does not show that, so the program is read before it is compiled.
    """
    config = LlamaConfig.from_hf(configs.load("llama-tiny"))
    config = dataclasses.replace(config, num_hidden_layers=1, vocab_size=1009)
    params = jax.tree.map(lambda x: x, llama.abstract_params(config))
    if kept == "int8":
        values = jax.ShapeDtypeStruct((config.hidden_size // 32, 1009, 32, 1), jnp.int8)
        scale = jax.ShapeDtypeStruct((config.hidden_size // 32, 1009), jnp.bfloat16)
        kept = QuantizedMatrix(values, scale, None, 1, 0, True, "float32")
        params["embed"]["embedding"] = kept
    processors, state = init_sampler(Sampling(top_k=5, logprobs=2), [[0]], config.vocab_size)

    def step(params, token):
        logits, _ = llama.forward(params, config, token, token, llama.causal_attend)
        return sample(processors, state, logits[:, 0])[0]

    text = jax.jit(step).lower(params, jnp.zeros((1, 1), jnp.int32)).as_text()
    gathers = re.findall(
        r"stablehlo\.gather.* : \(tensor<([\dx]+)x\w+>, tensor<([\dx]+)xi32>\)", text
    )
    taken = [indices for operand, indices in gathers if "1009" in operand.split("x")]
    assert len(taken) >= 2  # a row of the embedding; a score
    assert not [indices for indices in taken if set(indices.split("x")[:-1]) <= {"1"}]
    assert not re.search(r"dynamic_slice.*tensor<([\dx]+x)?1009x", text)
