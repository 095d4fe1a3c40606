"""Times of calls on a GPU: of their kernels alone (CUPTI), and of the wall, launches included."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

ROUND = 0.15
"""Seconds that one round of calls takes, about."""


SLOW = 0.2
"""Seconds of a call that is timed once: an alternative that nobody would take."""


def kernel_seconds(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> float | None:
    """Durations of a call's kernels, summed, median over `inputs`; None where CUPTI is not there.

    Args:
      call: jitted and warm.
      inputs: argument tuples, together larger than the L2 cache; one is used after another.
    """
    try:
        from jax.experimental.mosaic.gpu import profiler

        measured = []
        for arguments in (*inputs, *inputs, *inputs):
            _, milliseconds = profiler.measure(call)(*arguments)
            if milliseconds is None:
                return None
            measured.append(milliseconds / 1e3)
        return statistics.median(measured)
    except (ImportError, RuntimeError, AttributeError):
        return None


def wall_seconds(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> float:
    """Time a call takes when many are queued one behind another, so that the host's part is hidden.

    Where launching takes longer than running, this is the time of a launch.
    """
    started = time.perf_counter()
    jax.block_until_ready(call(*inputs[0]))
    repeats = max(2, min(100, round(ROUND / (time.perf_counter() - started))))
    rounds = []
    for _ in range(3):
        jax.block_until_ready(call(*inputs[0]))
        started = time.perf_counter()
        last = None
        for i in range(repeats):
            last = call(*inputs[i % len(inputs)])
        jax.block_until_ready(last)
        rounds.append((time.perf_counter() - started) / repeats)
    return statistics.median(rounds)


def measure(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> dict:
    """Both times, in microseconds, after warming up on every input.

    Of a call that takes `SLOW` seconds or more, one is timed, and its kernels are not told apart.
    """
    jax.block_until_ready(call(*inputs[0]))
    started = time.perf_counter()
    jax.block_until_ready(call(*inputs[0]))
    if (once := time.perf_counter() - started) >= SLOW:
        return {"kernel_us": None, "wall_us": round(once * 1e6, 2)}
    for arguments in inputs[1:]:
        jax.block_until_ready(call(*arguments))
    kernels = kernel_seconds(call, inputs)
    wall = wall_seconds(call, inputs)
    return {
        "kernel_us": None if kernels is None else round(kernels * 1e6, 2),
        "wall_us": round(wall * 1e6, 2),
    }


def best(row: dict) -> float:
    """Seconds to compare: of the kernels where they are known."""
    return (row["kernel_us"] or row["wall_us"]) / 1e6


def copy_bandwidth(megabytes: int) -> float:
    """Bytes a second of reading an array and writing another of its size."""
    n = megabytes * 1024 * 1024 // 4
    add = jax.jit(lambda x: x + 1.0)
    inputs = [(jnp.full(n, float(i), jnp.float32),) for i in range(2)]
    return 8 * n / best(measure(add, inputs))


def matmul_rate(size: int) -> float:
    """FLOP a second of a bf16 product of two square matrices."""
    multiply = jax.jit(lambda a, b: a @ b)
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    return 2 * size**3 / best(measure(multiply, [(a, b)]))


def torch_us(call: Callable[[], Any]) -> float:
    """Microseconds of a torch call, by CUDA events, many queued one behind another."""
    import torch

    for _ in range(3):
        call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        call()
    end.record()
    torch.cuda.synchronize()
    return round(begin.elapsed_time(end) / 20 * 1e3, 2)
