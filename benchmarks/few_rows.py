"""Products of a few rows with one matrix on a CPU: dense, in 16 bits, quantized; and other ways to
write them.

    python benchmarks/few_rows.py [--inputs 576] [--outputs 1536] [--rows 1 4 8 16 32 64]

Each line is one way and number of rows, and the milliseconds of the quickest of many calls, which
multiply with several matrices so that none stays in a core's cache. Ways:

float32            what the model does: [R, E] times [E, F]
float32, [F, E]    the matrix lies transposed and is the first operand
bfloat16           what the model does (`models.matrices.contract`)
bfloat16, sums     the same product written with `jnp.sum`, which XLA gives to a library
int8               what the model does (`models.quantized`)
int8, integers     by sums of integers, however many rows
int8, along E      by dequantized parts that lie along E, as on other devices
int8, along F      by parts along F
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from machine import facts

from alaya_jax.models import quantized
from alaya_jax.models.matrices import contract, summed
from alaya_jax.models.quantized import QuantizedMatrix

BYTES = 2**24  # of the matrices in float32, at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=576)
    parser.add_argument("--outputs", type=int, default=1536)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--calls", type=int, default=60)
    options = parser.parse_args()
    print(json.dumps({"facts": facts("jax", "jaxlib"), "options": vars(options)}), flush=True)
    random = np.random.default_rng(0)
    shape = options.inputs, options.outputs
    count = max(1, -(-BYTES // (4 * options.inputs * options.outputs)))
    weights = [random.standard_normal(shape, np.float32) for _ in range(count)]
    for rows in options.rows:
        x = jnp.asarray(random.standard_normal((rows, options.inputs), np.float32))
        for way, product, matrices in ways(weights):
            least = measured(product, x, matrices, options.calls)
            line = {"way": way, "rows": rows, "ms": 1e3 * least / count}
            print(json.dumps(line), flush=True)


def ways(weights: list[np.ndarray]) -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:
    """Name, product of rows and a matrix, matrices."""
    wide = [jnp.asarray(w) for w in weights]
    halves = [w.astype(jnp.bfloat16) for w in wide]
    eight = [in_eight_bits(w) for w in weights]
    yield "float32", lambda x, w: contract(x, w, 1), wide
    first = ((1,), (1,)), ((), ())
    yield "float32, [F, E]", lambda x, w: lax.dot_general(w, x, first), [w.T.copy() for w in wide]
    yield "bfloat16", lambda x, w: contract(x.astype(w.dtype), w, 1), halves
    yield "bfloat16, sums", by_sums, halves
    yield "int8", lambda x, w: w.contract(x, 1), eight

    def grouped(product: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, w: product(x.reshape(len(x), -1, w.group), w)

    yield "int8, integers", grouped(quantized._in_integers), eight
    for axis, name in enumerate("EF"):
        along = functools.partial(quantized._along, axis=axis)
        yield f"int8, along {name}", grouped(along), eight


def by_sums(x: Any, w: Any) -> Any:
    some = x.reshape(len(x), -1, 8, 1)
    terms = some * w.reshape(1, -1, 8, w.shape[1]).astype(jnp.float32)
    return summed(lax.optimization_barrier(jnp.sum(terms, axis=2)))


def in_eight_bits(matrix: np.ndarray) -> QuantizedMatrix:
    blocks = quantized.quantize(matrix, "int8", 0)
    values = jnp.asarray(quantized.tiled(blocks.values, len(blocks.scale), 0))
    more = {"inputs": 1, "axis": 0, "embedding": False, "compute": "float32"}
    return QuantizedMatrix(values, jnp.asarray(blocks.scale), None, **more)


def measured(product: Callable[..., Any], x: Any, matrices: list[Any], calls: int) -> float:
    """Seconds of the quickest call, for all matrices."""

    def all_of_them(x: Any, matrices: list[Any]) -> Any:
        # Other rows for each matrix, or equal work would be done once.
        return sum(product(x + i, w).sum() for i, w in enumerate(matrices))

    run, least = jax.jit(all_of_them), float("inf")
    jax.block_until_ready(run(x, matrices))
    for _ in range(calls):
        started = time.perf_counter()
        jax.block_until_ready(run(x, matrices))
        least = min(least, time.perf_counter() - started)
    return least


if __name__ == "__main__":
    main()
