"""The constants of a device for the cost model, measured with the engine itself, once.

Full attention, the exact scores, and retrievals through `Sketch`, by key and by page, run over
random keys, at two lengths each and with few keys kept and many; where a graph is of interest, a
search through one, with two ranges. The least of some calls counts: what the device does when
nothing disturbs it. The result is kept in the cache directory, by device, JAX version and shape of
the layer.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alaya_jax.attention import engine
from alaya_jax.cache import PageTable
from alaya_jax.cache.tables import table_width
from alaya_jax.checkpoint import beside
from alaya_jax.checkpoint.bundled import cache_directory
from alaya_jax.index.memory import LayerMemory
from alaya_jax.models.config import LlamaConfig
from alaya_jax.optimizer.bench import LayerBench, Timed, least
from alaya_jax.optimizer.cost import Machine
from alaya_jax.optimizer.prefill import PrefillMachine
from alaya_jax.pallas_kernels.dispatch import current_target
from alaya_jax.progress import progress_bar
from alaya_jax.query import Full, Tiles
from alaya_jax.query.plan import Plan
from alaya_jax.settings import under_own_settings

_MEGABYTES = 128  # of the arrays that are copied and multiplied: more than caches hold
_COMPILERS = 2  # threads
_QUERIES = 128  # of a prefill
_SHARP, _BROAD = 1e3, 3.0
"""Scales of a query: its scores are so far apart that one key is kept, or some percent of them."""

_RETRIEVALS = {
    "sketch": ("sketch", "select", "gather", "find"),
    "pages": ("page_scan", "page_select", "page_gather", "page_find"),
}
"""By program, the constants that `_retrieval` finds."""

_RANGE = 0.9  # of scores, in their standard deviations: some hundred keys of a group lie in it


@under_own_settings
def machine_for(
    config: LlamaConfig,
    dtype: Any,
    page_size: int = 16,
    tensor: int = 1,
    *,
    pages: bool | None = None,
    graph: bool = False,
    again: bool = False,
    progress: bool = False,
) -> Machine:
    """The constants for a model's layer on the default device: those kept, or measured now.

    Args:
      config: of the model.
      dtype: of keys and values.
      page_size: Z.
      tensor: devices that the heads are split over.
      pages: whether to measure retrieval by page too. Default: yes, except on a CPU, where it has
        been slower than retrieval by key at every length measured, and costs two more programs to
        compile.
      graph: whether to measure a graph's search too.
      again: measures what is kept, those of a prefill too when they are asked for next.
      progress: shows a bar on stderr when it is a terminal and something is measured.
    """
    shape = _share(config, tensor)
    path, key = _place(shape, dtype, page_size, "")
    known = _read(Machine, path, key)
    pages = current_target().platform != "cpu" if pages is None else pages
    if known is not None and pages and known.page_scan is None:
        known = None
    if again:
        graph |= known is not None and known.walk is not None
        known = None
        _place(shape, dtype, page_size, "prefill ")[0].unlink(missing_ok=True)
    if known is None or (graph and known.walk is None):
        asked = {"pages": pages, "graph": graph, "known": known, "progress": progress}
        known = measure(shape, dtype, page_size, **asked)
        _write(path, key, known)
    return known


@under_own_settings
def prefill_for(
    config: LlamaConfig,
    dtype: Any,
    page_size: int = 16,
    tensor: int = 1,
    *,
    progress: bool = False,
) -> PrefillMachine:
    """`machine_for` of a prefill's constants."""
    shape = _share(config, tensor)
    path, key = _place(shape, dtype, page_size, "prefill ")
    known = _read(PrefillMachine, path, key)
    if known is None:
        known = measure_prefill(shape, dtype, page_size, progress=progress)
        _write(path, key, known)
    return known


def _share(config: LlamaConfig, tensor: int) -> LlamaConfig:
    """The shape of a device's heads."""
    heads, kv_heads = config.num_attention_heads // tensor, config.num_key_value_heads // tensor
    return dataclasses.replace(config, num_attention_heads=heads, num_key_value_heads=kv_heads)


def _place(config: LlamaConfig, dtype: Any, page_size: int, kind: str) -> tuple[Path, str]:
    """The file, and what is written in it to say of what it is."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    parts = [device_name(), jax.__version__, np.dtype(dtype).name, heads, kv_heads, config.head_dim]
    key = kind + " ".join(map(str, [*parts, page_size]))
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    return cache_directory() / "machine" / name, key


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


def busy_share(seconds: float = 0.2) -> float:
    """The share of this machine's CPUs that is at work while this process waits; 0 where the
    system does not say.
    """

    def times() -> tuple[int, int]:
        with open("/proc/stat") as file:
            user, nice, system, idle, waiting, *rest = map(int, file.readline().split()[1:9])
        return idle + waiting, user + nice + system + idle + waiting + sum(rest)

    try:
        (idle, total) = times()
        time.sleep(seconds)
        (idle_now, total_now) = times()
    except (OSError, ValueError):
        return 0.0  # not Linux
    return max(0.0, 1 - (idle_now - idle) / max(total_now - total, 1))


def measure(
    config: LlamaConfig,
    dtype: Any,
    page_size: int = 16,
    *,
    pages: bool = False,
    graph: bool = False,
    known: Machine | None = None,
    progress: bool = False,
) -> Machine:
    """Measures the default device for layers of this shape; takes some seconds.

    Args:
      config: the shape.
      dtype: of keys and values.
      page_size: Z.
      pages: measures a retrieval by page, too.
      graph: measures a search of a graph, too.
      known: what was measured without a graph; only that is measured now.
      progress: shows a bar on stderr when it is a terminal.
    """
    bench = LayerBench.create(config, dtype, page_size)
    retrievals = ["sketch"] + ["pages"] * pages if known is None else []
    programs = retrievals + ["graph"] * graph + [f"narrow {name}" for name in retrievals]
    programs += ["full", "flat"] if known is None else []
    steps = 2 * len(programs) + (known is None)
    with progress_bar("measuring this machine", steps, "steps", show=progress) as advance:
        # Compiling takes most of the time.
        with ThreadPoolExecutor(_COMPILERS) as pool:
            compiled = under_own_settings(bench.compiled)  # threads have settings of their own
            ready = {name: pool.submit(compiled, name) for name in programs}
            for program in ready.values():
                program.result()
                advance(1)
        found = known
        if found is None:
            busy = busy_share()
            rates = dict(zip(("copy", "matmul", "weights"), _rates(dtype), strict=True))
            advance(1)
            terms = _terms(bench, {name: x.result() for name, x in ready.items()}, advance)
            found = Machine(device=device_name(), **rates, **terms, busy=busy)
        if graph:
            found = dataclasses.replace(found, **_graph_terms(bench, ready["graph"].result()))
            advance(1)
        return found


def measure_prefill(
    config: LlamaConfig, dtype: Any, page_size: int = 16, *, progress: bool = False
) -> PrefillMachine:
    """Measures a block of queries over all keys: in full, by lists of all blocks, and of few."""
    bench = LayerBench.create(config, dtype, page_size)
    n = bench.length
    rng = np.random.default_rng(2)
    shape = (1, _QUERIES, config.num_attention_heads, config.head_dim)
    q = jnp.asarray(rng.standard_normal(shape, np.float32), bench.k.dtype)
    ids, known = np.arange(1, bench.k.shape[1], dtype=np.int32), np.full(1, n - _QUERIES, np.int32)
    table = PageTable(*jax.device_put((ids[None], known)))
    rest = q, LayerMemory(bench.k, bench.v, table), np.full(1, _QUERIES, np.int32)
    full, tiles = Plan(Full()), Plan(Tiles(recovery=1.0))
    few = Plan(Tiles(recovery=1e-3))
    with progress_bar("measuring this machine", 4, "steps", show=progress) as advance:
        with ThreadPoolExecutor(2) as pool:
            plans = (tiles, full)
            compiled = under_own_settings(lambda plan: engine.attend.lower(plan, *rest).compile())
            run = pool.map(compiled, plans)
            of_tiles, of_full = run
        advance(1)
        seconds, share = {}, {}
        for name, call in (
            ("full", functools.partial(of_full, full, *rest)),
            ("all", functools.partial(of_tiles, tiles, *rest)),
            ("few", functools.partial(of_tiles, few, *rest)),
        ):
            seconds[name] = least(call) / (_QUERIES * n)
            share[name] = float(np.asarray(call()[1].scored).mean()) / n
            advance(1)
    tile, select = _line(share["few"], seconds["few"], share["all"], seconds["all"])
    return PrefillMachine(device_name(), seconds["full"], tile, select)


def _terms(
    bench: LayerBench, programs: dict[str, Timed], advance: Callable[[int], None]
) -> dict[str, float]:
    """The constants of all but a graph's search."""
    n, few, size = bench.length, bench.length // 8, bench.k.shape[2]
    full, flat = programs["full"], programs["flat"]
    call = full(_SHARP, size, None)[0]  # a page: nothing to speak of
    per_full, _ = _line(few, full(_SHARP, few, None)[0], n, full(_SHARP, n, None)[0])
    advance(1)
    per_flat, _ = _line(few, flat(_SHARP, few, None)[0], n, flat(_SHARP, n, None)[0])
    advance(1)
    outside = bench.window.sink + bench.window.recent
    rest = call + per_full * outside
    found = {"call": call, "full": per_full, "flat": per_flat}
    for kind, names in _RETRIEVALS.items():
        if kind in programs:
            terms = _retrieval(bench, programs[kind], programs[f"narrow {kind}"], rest)
            found |= dict(zip(names, terms, strict=True))
            advance(2)
    return found


def _retrieval(
    bench: LayerBench, wide: Timed, narrow: Timed, rest: float
) -> tuple[float, float, float, float]:
    """Seconds a key scanned, a column chosen from, a key read; and what is left beside `rest`."""
    n, few = bench.length, bench.length // 8
    scanned = wide(_SHARP, few, None)[0]
    (least, low), (most, high) = wide(_SHARP, n, None), wide(_BROAD, n, None)
    scan, left = _line(few, scanned, n, least)
    read = float(high.read.max()) - float(low.read.max())
    gather = max(most - least, 0.0) / max(read, 1.0)
    # The same keys in a table a part as wide.
    columns = table_width(1) * bench.k.shape[2]
    select, _ = _line(columns, narrow(_SHARP, few, None)[0], n, scanned)
    return scan, select, gather, max(left - rest - select * n, 0.0)


def _graph_terms(bench: LayerBench, graph: Timed) -> dict[str, float]:
    """The constants of a graph's search, by two ranges of scores."""
    spread = float(np.sqrt(bench.config.head_dim))  # of the scores
    least, few = graph(1.0, bench.length, 0.0)
    most, many = graph(1.0, bench.length, _RANGE * spread)
    visit, walk = _line(float(few.read.mean()), least, float(many.read.mean()), most)
    return {"walk": walk, "visit": visit}


def _line(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float]:
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

    copied = least(copy)
    product = least(functools.partial(jax.jit(jnp.matmul), square, square))
    row = least(functools.partial(jax.jit(jnp.matmul), square[:1], matrix))
    return 2 * flat.nbytes / copied, 2 * side**3 / product, flat.nbytes / row


def _read(kind: type[Any], path: Path, key: str) -> Any:
    """What is kept; None where there is nothing, or not all that is wanted now."""
    try:
        data = json.loads(path.read_text())
        return kind(**data["machine"]) if data["of"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # measured again


def _write(path: Path, key: str, machine: Machine | PrefillMachine) -> None:
    data = {"of": key, "machine": dataclasses.asdict(machine)}
    with contextlib.suppress(OSError):  # what cannot be written is measured anew next time
        beside.replace(path, json.dumps(data, indent=1).encode())
