"""What moving pages costs, by size; whether the host can attend where they lie; page transfers."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CASES = ("host and device", "pinned host", "compute on the host", "transfer server")


def run(number: int, quick: bool, say: Callable[..., None]) -> None:
    """One of `CASES`."""
    sizes = [2**16, 2**20] if quick else [2**16, 2**18, 2**20, 2**22, 2**24, 2**26, 2**28]
    (_plain, _pinned, _host_compute, _transfer)[number](
        sizes, functools.partial(say, case=CASES[number])
    )


def _best(call: Callable[[], Any], rounds: int = 5) -> float:
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def _plain(sizes: list[int], say: Callable[..., None]) -> None:
    """numpy arrays to the device and back."""
    for size in sizes:
        host = np.random.default_rng(0).integers(0, 255, size, np.uint8)
        device = jax.device_put(host)
        bump = jax.jit(lambda x: x + 1)
        up = _best(lambda: jax.block_until_ready(jax.device_put(host)))  # noqa: B023
        down = _best(lambda: np.asarray(bump(device)))  # noqa: B023
        say(what=f"{size:,} bytes", up_bytes_per_s=size / up, down_bytes_per_s=size / down)


def _pinned(sizes: list[int], say: Callable[..., None]) -> None:
    """Between device memory and pinned host memory, inside jit and by device_put."""
    device = jax.devices()[0]
    here = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
    there = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    for size in sizes:
        x = jax.device_put(jax.random.bits(jax.random.key(0), (size,), jnp.uint8), there)
        y = jax.block_until_ready(jax.device_put(x, here))
        up = _best(lambda: jax.block_until_ready(jax.device_put(x, here)))  # noqa: B023
        down = _best(lambda: jax.block_until_ready(jax.device_put(y, there)))  # noqa: B023
        inside = jax.jit(lambda x: jax.device_put(x, here) + 1, out_shardings=here)
        jax.block_until_ready(inside(x))
        jit = _best(lambda: jax.block_until_ready(inside(x)))  # noqa: B023
        say(
            what=f"{size:,} bytes", up_bytes_per_s=size / up, down_bytes_per_s=size / down,
            up_in_jit_bytes_per_s=size / jit,
        )  # fmt: skip


def _host_compute(sizes: list[int], say: Callable[..., None]) -> None:
    """Attention of one token over keys in host memory, by `compute_on("device_host")` and by the
    CPU backend.
    """
    from jax.experimental.compute_on import compute_on

    heads, group, dim = 8, 4, 128
    n = max(64, sizes[-2] // (heads * dim * 4))
    device = jax.devices()[0]
    there = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    here = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
    k = jax.device_put(jax.random.normal(jax.random.key(0), (heads, n, dim)), there)
    q = jax.random.normal(jax.random.key(1), (heads, group, dim))

    def attend(q: Any, k: Any) -> Any:
        weights = jax.nn.softmax(jnp.einsum("kgd,knd->kgn", q, k) * dim**-0.5, axis=-1)
        return jnp.einsum("kgn,knd->kgd", weights, k)

    cpu = jax.devices("cpu")[0]
    on_cpu = jax.jit(attend)  # where its arguments are
    k_cpu, q_cpu = jax.device_put(np.asarray(k), cpu), jax.device_put(np.asarray(q), cpu)
    expected = np.asarray(on_cpu(q_cpu, k_cpu))
    took = _best(lambda: jax.block_until_ready(on_cpu(q_cpu, k_cpu)))
    say(what=f"CPU backend, {k.nbytes:,} bytes", host_ms=round(took * 1e3, 3))

    @jax.jit
    def inside(q: Any, k: Any) -> Any:
        host = compute_on(
            attend, compute_type="device_host", out_memory_spaces=jax.memory.Space.Host
        )
        return jax.device_put(host(jax.device_put(q, there), k), here)

    got = np.asarray(inside(q, k))
    error = float(np.abs(got - expected).max())
    took = _best(lambda: jax.block_until_ready(inside(q, k)))
    say(what=f"compute_on, {k.nbytes:,} bytes", host_ms=round(took * 1e3, 3), error=error)


def _transfer(sizes: list[int], say: Callable[..., None]) -> None:
    """`jax.experimental.transfer` from this process to itself, over loopback."""
    from jax.experimental import transfer

    device = jax.devices()[0]
    client = device.client
    server = transfer.start_transfer_server(client, "127.0.0.1:0", ["127.0.0.1:0"])
    link = server.connect(server.address())
    spec = jax.sharding.SingleDeviceSharding(device)
    for number, size in enumerate(sizes):
        x = jax.block_until_ready(jax.random.bits(jax.random.key(0), (size,), jnp.uint8))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec)

        def once(uuid: int, x: Any = x, shape: Any = shape) -> Any:
            server.await_pull(uuid, [x])
            return jax.block_until_ready(link.pull(uuid, [shape]))

        got = once(100 * number)
        same = bool(jnp.array_equal(got[0], x))
        times = []
        for turn in range(3):
            started = time.perf_counter()
            once(100 * number + turn + 1)
            times.append(time.perf_counter() - started)
        say(what=f"{size:,} bytes, equal {same}", pull_bytes_per_s=size / min(times))
