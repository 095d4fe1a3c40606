"""What the optimizer is told of a batch, or of a model that is not loaded yet."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from alaya_jax.cache.pool import PagePool
from alaya_jax.index import Sketch, learnt
from alaya_jax.models.config import LlamaConfig
from alaya_jax.optimizer import calibration
from alaya_jax.optimizer.choice import PlanChoice
from alaya_jax.optimizer.choose import GRAPH_FROM, choose
from alaya_jax.optimizer.cost import Machine, Workload
from alaya_jax.optimizer.machine import machine_for, prefill_for
from alaya_jax.optimizer.prefill import PrefillChoice, choose_prefill
from alaya_jax.pallas_kernels.dispatch import current_target
from alaya_jax.query import Full
from alaya_jax.query.auto import Auto
from alaya_jax.query.plan import Plan, default_sketch
from alaya_jax.runtime.batch import Batch
from alaya_jax.settings import under_own_settings


def choose_for(auto: Auto, batch: Batch, length: int) -> PlanChoice:
    """What `auto` means in a batch whose sequences grow to so many tokens.

    The first call on a machine measures it, some seconds; see `machine.py`.

    Raises:
      PlanError: it cannot be had.
    """
    model, pool = batch.model, batch.pool
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    tied = model.config.tie_word_embeddings
    idle = 0 if tied else model.params["embed"]["embedding"].nbytes  # a token reads one row of it
    tensor, context = _split(pool)
    graph, known = batch.graphs.known() if context == 1 else (None, 0)
    work = Workload(
        config=model.config,
        dtype=model.dtype,
        length=length,
        batch=batch.size,
        page_size=pool.page_size,
        pool_tokens=pool.num_pages * pool.page_size,
        weight_bytes=weights - idle,
        idle_bytes=idle,
        graph=graph,
        graph_length=known,
        graph_bytes=None if graph is None else batch.graph_bytes(graph),
        sketches=_sketches(model.config, batch.indexes.learnt),
        tensor=tensor,
        context=context,
    )
    found = calibration.find(model.fingerprint, model.directory)
    with pool.here():
        machine = _machine(work, progress=True)
    # A CPU beside the model's devices does not say what it has, and its pages are no budget's.
    there = memory_beside(weights, pool.mesh) if pool.device is None else None
    given = batch.room_beside(work.sketches) if pool.device is None else None
    room = min((x for x in (there, given) if x is not None), default=None)
    return choose(auto, work, machine, found, room)


def choose_prefill_for(auto: Auto, batch: Batch, length: int) -> PrefillChoice:
    """What `auto` means for the tokens that a batch's sequences lack of such a length."""
    model = batch.model
    if auto.prefill == "dense":
        return PrefillChoice(Plan(Full()), 0.0, {})
    tensor, context = _split(batch.pool)
    size = batch.pool.page_size
    with batch.pool.here():
        machine = prefill_for(model.config, model.dtype, size, tensor, progress=True)
    layers, known = model.config.num_hidden_layers, min(batch.lengths)
    # Each device scores its share of the keys.
    of_all = dataclasses.replace(
        machine, **{f: getattr(machine, f) / context for f in ("full", "tile", "select")}
    )
    return choose_prefill(auto, layers, of_all, known, length)


def _split(pool: PagePool) -> tuple[int, int]:
    """Devices that heads and keys are split over."""
    axes = (pool.rules.axis(name, pool.mesh) for name in ("kv_heads", "pages"))
    heads, pages = (pool.mesh.shape[axis] if pool.mesh and axis else 1 for axis in axes)
    return heads, pages


@under_own_settings
def choose_before(
    auto: Auto,
    config: LlamaConfig,
    dtype: Any,
    length: int,
    *,
    batch: int,
    parameters: int,
    fingerprint: str,
    directory: Path | None,
) -> PlanChoice:
    """What `auto` would mean for a model that is not loaded.

    Args:
      auto: what is asked.
      config, dtype, parameters, fingerprint, directory: of the model.
      length: tokens of each sequence.
      batch: B.

    Raises:
      PlanError: it cannot be had.
    """
    item = np.dtype(dtype).itemsize
    weights = parameters * item
    tied = config.tie_word_embeddings
    idle = 0 if tied else config.vocab_size * config.hidden_size * item
    # Of all but the window a graph might be built.
    covered = max(length - int(auto.window.recent), 0)
    work = Workload(
        config,
        np.dtype(dtype),
        length,
        batch,
        weight_bytes=weights - idle,
        idle_bytes=idle,
        graph_length=covered,
        sketches=_sketches(config, learnt.find(fingerprint, directory)),
    )
    found = calibration.find(fingerprint, directory)
    machine = _machine(work, progress=True)
    return choose(auto, work, machine, found, memory_beside(weights, None))


def _sketches(config: LlamaConfig, found: learnt.Learnt | None) -> tuple[Sketch, ...]:
    """The sketch that plans take by themselves. One learnt bit would take less memory, but does not
    keep a promise of mass at 32,768 tokens (docs/decisions.md): that is for a user to choose.
    """
    return (default_sketch(config, lambda: found is not None),)


def _machine(work: Workload, progress: bool) -> Machine:
    """This machine's constants; those of a graph where there is one, or might well be."""
    graph = work.graph is not None or work.graph_length >= GRAPH_FROM
    return machine_for(
        work.config, work.dtype, work.page_size, work.tensor, graph=graph, progress=progress
    )


def default_dtype(stored: dict[str, int]) -> str:
    """The dtype a model is loaded in where none is named (see `checkpoint.read_checkpoint`).

    Args:
      stored: stored types, by the names that formats have for them, and how many parameters have
        each; quantized ones are read as float32 on a CPU, as bfloat16 elsewhere.
    """
    most = max(stored, key=lambda name: stored[name])
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return names.get(most, "float32" if current_target().platform == "cpu" else "bfloat16")


def memory_beside(weights: int, mesh: Any) -> int | None:
    """Bytes that the devices have beside the weights; None where they do not say."""
    devices = list(mesh.devices.flat) if mesh is not None else jax.devices()[:1]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    known = [limit for limit in limits if limit is not None]
    return max(sum(known) - weights, 0) if len(known) == len(limits) else None
