"""The constants of a device for the cost model, measured with the engine itself, once.

Three attention programs (`Full`, and a retrieval through `Flat` and through `Sketch`) run over
random keys, at two lengths each and with few keys kept and many. The least of some calls counts:
what the device does when nothing disturbs it. The result is kept in the cache directory, by device,
JAX version and shape of the layer.
"""

import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alaya_jax.attention import engine
from alaya_jax.cache import PageTable
from alaya_jax.checkpoint.bundled import cache_directory
from alaya_jax.index import Sketch
from alaya_jax.models.config import LlamaConfig
from alaya_jax.pool import table_width
from alaya_jax.query import DIPR, Full, Window
from alaya_jax.query.cost import Machine
from alaya_jax.query.plan import Plan, plan_for

SECONDS = 0.15
"""For which each program is called again and again, at least `_CALLS` times."""

_CALLS = 5
_MEGABYTES = 128  # of the arrays that are copied and multiplied: more than caches hold


def machine_for(config: LlamaConfig, dtype: Any, page_size: int = 16, tensor: int = 1) -> Machine:
    """The constants for a model's layer on the default device: those kept, or measured now.

    Args:
      config: of the model.
      dtype: of keys and values.
      page_size: Z.
      tensor: devices that the heads are split over.
    """
    heads, kv_heads = config.num_attention_heads // tensor, config.num_key_value_heads // tensor
    shape = dataclasses.replace(config, num_attention_heads=heads, num_key_value_heads=kv_heads)
    device = device_name()
    parts = [device, jax.__version__, np.dtype(dtype).name, heads, kv_heads, config.head_dim]
    key = " ".join(map(str, [*parts, page_size]))
    path = cache_directory() / "machine" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    kept = _read(path, key)
    if kept is None:
        kept = measure(shape, dtype, page_size)
        _write(path, key, kept)
    return kept


def device_name() -> str:
    """What kind of device this is; of a CPU its model and the number of its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a CPU that Linux does not name so: its architecture must do
    return f"{name}, {os.cpu_count()} cores"


def measure(config: LlamaConfig, dtype: Any, page_size: int = 16) -> Machine:
    """Measures the default device for layers of this shape; takes some seconds."""
    copy, matmul, weights = _rates(dtype)
    window = Window(sink=page_size, recent=64)
    pages, n = table_width(1), table_width(1) * page_size
    few, many = n // 8, n
    kv, d = config.num_key_value_heads, config.head_dim
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    k, v = (jnp.asarray(random(kv, pages + 1, page_size, d), dtype) for _ in range(2))
    # Scores of many deviations keep the best key only; of three, some percent of the keys.
    q = random(1, 1, config.num_attention_heads, d)
    sharp, broad = (jnp.asarray(x * q, dtype) for x in (1e3, 3.0))
    ids = jnp.arange(1, pages + 1, dtype=jnp.int32)
    whole = jnp.full(pages, page_size, jnp.int32)

    def attend(plan: Plan, index: Any) -> Callable[[Any, int], tuple[float, float]]:
        run = functools.partial(
            engine.attend, plan, k_pages=k, v_pages=v, count=jnp.ones(1, jnp.int32), index=index
        )

        def at(q: Any, length: int) -> tuple[float, float]:
            """Seconds, and keys read for the kv head that reads most."""
            table = PageTable(ids[None], jnp.full(1, length - 1, jnp.int32))
            call = functools.partial(run, q=q, table=table, covered=jnp.full(1, length, jnp.int32))
            read = float(np.asarray(call()[1].read).max())
            return _least(call), read

        return at

    asked = DIPR(recovery=0.95, window=window)
    full = attend(Plan(Full()), None)
    flat_plan = plan_for(asked, config, 1)
    sketch_plan = plan_for(asked, config, 1 << 30)
    assert isinstance(flat_plan, Plan)
    assert isinstance(sketch_plan, Plan)
    assert isinstance(sketch_plan.index, Sketch)
    layer = sketch_plan.index.create(config, pages + 1, page_size, jnp.dtype(dtype))
    layer = jax.jit(lambda layer, *args: layer.build(*args))(layer, k, v, ids, whole)

    per_full, call = _line(few, full(sharp, few)[0], many, full(sharp, many)[0])
    flat, sketch = attend(flat_plan, None), attend(sketch_plan, layer)
    by_index, rest = {}, []
    for name, at in (("flat", flat), ("sketch", sketch)):
        by_index[name], left = _line(few, at(sharp, few)[0], many, at(sharp, many)[0])
        rest.append(left)
    outside = window.sink + window.recent
    select = max((np.mean(rest) - call - per_full * outside) / n, 0.0)
    (least, low), (most, high) = sketch(sharp, many), sketch(broad, many)
    gather = max(most - least, 0.0) / max(high - low, 1.0)
    return Machine(
        device=device_name(),
        copy=copy,
        matmul=matmul,
        weights=weights,
        call=call,
        full=per_full,
        select=float(select),
        gather=gather,
        **by_index,
    )


def _line(x0: int, y0: float, x1: int, y1: float) -> tuple[float, float]:
    """Slope and what is left at 0, neither below 0."""
    slope = max(y1 - y0, 0.0) / (x1 - x0)
    return slope, max(y0 - slope * x0, 0.0)


def _rates(dtype: Any) -> tuple[float, float, float]:
    """Copy bytes/s, FLOP/s of a product, bytes/s of a matrix times a row."""
    count = _MEGABYTES * 2**20 // np.dtype(dtype).itemsize
    side = 1024
    flat = jnp.ones(count, dtype)
    square = jnp.ones((side, side), dtype)
    matrix = flat.reshape(side, -1)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: no time goes into new memory
    held = [jnp.ones(count, dtype)]

    def copy() -> Any:
        held[0] = add(held[0])
        return held[0]

    copied = _least(copy)
    product = _least(functools.partial(jax.jit(jnp.matmul), square, square))
    row = _least(functools.partial(jax.jit(jnp.matmul), square[:1], matrix))
    return 2 * flat.nbytes / copied, 2 * side**3 / product, flat.nbytes / row


def _least(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    times = []
    while len(times) < _CALLS or sum(times) < SECONDS:
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return min(times)


def _read(path: Path, key: str) -> Machine | None:
    """What is kept; None where there is nothing, or not all that is wanted now."""
    try:
        data = json.loads(path.read_text())
        return Machine(**data["machine"]) if data["of"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # measured again


def _write(path: Path, key: str, machine: Machine) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"of": key, "machine": machine.to_dict()}, indent=1))
        part.replace(path)
    except OSError:
        pass  # a cache that cannot be written is measured anew next time
