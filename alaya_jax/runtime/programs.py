"""The compiled programs of a running model: some layers of a step, its end, and what layers ask.

A step is `layers` as often as it takes (see `stack.Stack`) and, where a token is chosen, `end`. A
program holds a few layers, not all: what compiles does not grow with the number of layers, and one
compiled program serves every group of layers that are alike. Each takes the cache of its layers,
gives it back, and donates it: it is updated in place, never copied. Numbers that vary while a model
runs (lengths, thresholds, which layer comes first) are data; what would compile anew is a new batch
size, chunk size or page-table width, and those come in buckets.

`step` is the same as one pure function, for programs of one's own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.attention import engine
from alaya_jax.attention.counts import Counts
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.cache.tiers import HostPages
from alaya_jax.frame import Frame
from alaya_jax.index.memory import LayerMemory, Memory
from alaya_jax.models import llama
from alaya_jax.models.llama import Params
from alaya_jax.query.plan import Attention, Plan, of_layer, plan_for
from alaya_jax.runtime.sampling.sampler import (
    Alternatives,
    Processors,
    SamplerState,
    likeliest,
    sample,
)
from alaya_jax.settings import under_own_settings
from alaya_jax.sharding import auto_axes, laid, whole


@under_own_settings
def step(
    params: Params,
    memory: Memory,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    plans: Attention,
    frame: Frame,
) -> tuple[Float[Array, "B V"], Memory, Counts]:
    """The model over `count[b]` new tokens of each sequence; pure, not compiled.

    Args:
      params: of the model.
      memory: the pages of the new tokens are allocated and in its table.
      tokens: padded to T.
      count: how many of the T are real.
      plans: how attention is answered; a query or a plan, or one a layer.
      frame: what is static.

    Returns:
      logits of each sequence's last new token, float32; the memory with the new tokens; what was
      read, [L, B, H], summed over the new tokens.

    Raises:
      RequestError: plans that are none, or not of this model's layers or heads.
    """

    def run(frame: Frame, params: Params, memory: Memory, *rest: Any) -> Any:
        tokens, count, plans = rest
        config, layers = frame.config, range(frame.config.num_hidden_layers)
        blocks = [llama.layer_params(params, i) for i in layers]
        each = [of_layer(plans, i) for i in layers]
        x = llama.embed(params, config, tokens)
        made = _run(frame, blocks, x, each, [memory.layer(i) for i in layers], count)
        rows = [dataclasses.replace(counts, met=None) for counts in made.counts]
        counts = jax.tree.map(lambda *x: jnp.stack(x), *rows)
        return llama.head(params, config, last_of(made.x, count)), made.kv, counts

    plans = plan_for(plans, frame.config, 0)
    everywhere, pool = PartitionSpec(), frame.rules.pool(frame.mesh)
    of_kv = jax.tree.map(lambda _: pool and pool.spec, memory.kv)
    logits, kv, counts = by_the_compiler(
        run, frame, (everywhere, of_kv, everywhere), params, memory, tokens, count, plans
    )
    table = dataclasses.replace(memory.table, length=memory.table.length + count)
    return logits, dataclasses.replace(memory, kv=kv, table=table), counts


def by_the_compiler(function: Callable[..., Any], frame: Frame, places: Any, *args: Any) -> Any:
    """`function(frame, *args)`, whose values the compiler places.

    With explicit axes every array says where it lies; so does the result then, by `places`.
    """
    mesh = frame.mesh
    if mesh is None or (auto := auto_axes(mesh)) is mesh:
        return function(frame, *args)
    run: Any = jax.sharding.auto_axes(
        functools.partial(function, dataclasses.replace(frame, mesh=auto)),
        axes=mesh.axis_names,
        out_sharding=places,
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return run(*args)


def last_of(x: Float[Array, "B T E"], count: Int[Array, " B"]) -> Float[Array, "B E"]:
    """Of each sequence's last new token."""
    return jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]


class _Made(NamedTuple):
    """What consecutive layers make: x, and of each layer what it writes, reads and asks."""

    x: Float[Array, "B T E"]
    kv: PagedKV
    counts: list[Counts]  # each [B, H]
    queries: list[Float[Array, "B T H D"]]


def _run(
    frame: Frame,
    blocks: Sequence[Params],
    x: Float[Array, "B T E"],
    plans: Sequence[Plan],
    memory: Sequence[LayerMemory],
    count: Int[Array, " B"],
    write: bool = True,
) -> _Made:
    """Consecutive layers that attend by plans to what the cache holds, new tokens included.

    Args:
      frame: what is static.
      blocks, plans, memory: of each layer; tables have lengths before the new tokens.
      x: what comes in.
      count: new tokens of each sequence.
      write: whether the new tokens' keys and values are to be written; else they are there.
    """
    positions = memory[0].table.length[:, None] + jnp.arange(x.shape[1])
    rotary = llama.rotation(frame.config, positions, frame.rope_length)
    ks, vs, counts, queries = [], [], [], []
    for block, plan, one in zip(blocks, plans, memory, strict=True):
        x, k, v, new, q = _layer(block, x, rotary, plan, one, count, frame=frame, write=write)
        ks, vs, counts, queries = [*ks, k], [*vs, v], [*counts, new], [*queries, q]
    return _Made(x, PagedKV(tuple(ks), tuple(vs)), counts, queries)


@functools.partial(jax.jit, static_argnames=("frame", "write"))  # traced once, not once a layer
def _layer(
    block: Params,
    x: Float[Array, "B T E"],
    rotary: tuple[Array, Array],
    plan: Plan,
    memory: LayerMemory,
    count: Int[Array, " B"],
    *,
    frame: Frame,
    write: bool,
) -> tuple[Array, Array, Array, Counts, Array]:
    """One of them: x, the pools of keys and values, what was read [B, H], and the queries."""

    def attend(_: int, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        del state
        out, *made = attended(plan, memory, q, k, v, count, frame=frame, write=write)
        return out, (*made, q)

    x, made = llama.run_layers([block], frame.config, x, rotary, attend)
    return x, *made


def attended(
    plan: Plan,
    memory: LayerMemory,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    count: Int[Array, " B"],
    *,
    frame: Frame,
    write: bool,
) -> tuple[Array, Array, Array, Counts]:
    """Attention of a layer's new tokens, which join the cache if `write`: the answer, the pools of
    keys and values, what was read [B, H].
    """
    where: Any = {"mesh": frame.mesh, "rules": frame.rules}
    held = PagedKV((memory.k,), (memory.v,))
    if write:
        held = engine.append(held, 0, k, v, memory.table, count, **where)
    read = dataclasses.replace(memory, k=held.k[0], v=held.v[0])
    out, new = engine.attend(plan, q, read, count, **where)
    real = (jnp.arange(q.shape[1]) < count[:, None])[..., None]
    new = new.by_row(lambda x: jnp.sum(jnp.where(real, x, 0), axis=1))
    return out, held.k[0], held.v[0], new


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Passed:
    """What the programs of a step pass on beside the layers' input; donated.

    Attributes:
      last: what the newest layer made of each sequence's last new token, [B, E].
      layer: int32, the layer that comes next.
      counts: what the layers before it read, [L, B, H].
    """

    last: Float[Array, "B E"]
    layer: Int[Array, ""]
    counts: Counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fed:
    """The new tokens of a step.

    Attributes:
      tokens: padded to T.
      count: how many of the T are real.
      table: pages of the new tokens included, lengths before them.
      take: which of the T tokens' queries are wanted, where queries are.
    """

    tokens: Int[Array, "B T"]
    count: Int[Array, " B"]
    table: PageTable
    take: Int[Array, " n"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked:
    """How some consecutive layers attend: of each its plan, and what the plan's index holds.

    Attributes:
      plans: of each layer.
      indexes: of each layer; None: all keys are scored.
      covered: keys of each sequence that the indexes know; None: none.
      host: of each layer, the pages in mapped files; None: none.
    """

    plans: tuple[Plan, ...]
    indexes: tuple[Any, ...]
    covered: Int[Array, " B"] | None
    host: tuple[HostPages, ...] | None = None

    def memory(self, kv: PagedKV, table: PageTable) -> list[LayerMemory]:
        """What each of the layers reads."""
        host = self.host or (None,) * len(self.plans)
        return [
            LayerMemory(k, v, table, index, self.covered, pages)
            for k, v, index, pages in zip(kv.k, kv.v, self.indexes, host, strict=True)
        ]


@functools.partial(
    jax.jit, static_argnames=("frame",), donate_argnames=("kv", "x", "passed"), inline=False
)
@under_own_settings
def layers(
    outer: Params,
    blocks: tuple[Params, ...],
    kv: PagedKV,
    x: Float[Array, "B T E"],
    passed: Passed,
    fed: Fed,
    asked: Asked,
    *,
    frame: Frame,
) -> tuple[Array, PagedKV, Passed]:
    """Consecutive layers of a step over new tokens, from `passed.layer` on.

    Args:
      outer: see `llama.outer_params`; layer 0 begins with the embedding of the tokens.
      blocks: parameters of each of the layers.
      kv: of these layers only.
      x: what the layer before them made.
      passed: see `Passed`.
      fed: the new tokens.
      asked: how these layers attend.
      frame: what is static.

    Returns:
      what the last of them made, and the rest with these layers' part.
    """

    def run(frame: Frame, outer: Params, blocks: Any, kv: PagedKV, *rest: Any) -> Any:
        x, passed, fed, asked = rest
        x = embedded(frame, outer, x, passed.layer, fed.tokens)
        memory = asked.memory(kv, fed.table)
        made = _run(frame, blocks, x, asked.plans, memory, fed.count)
        x, kv = made.x.astype(x.dtype), made.kv
        counts = jax.tree.map(
            functools.partial(put_rows, passed.layer),
            passed.counts,
            *alike(passed.counts, made.counts),
        )
        last = jnp.where((fed.count > 0)[:, None], last_of(x, fed.count), passed.last)
        x, last, layer = laid((x, last, passed.layer + len(blocks)), whole(frame.mesh))
        passed = Passed(last, layer, laid(counts, by_heads(frame)))
        return x, laid(kv, frame.rules.pool(frame.mesh)), passed

    everywhere, pool = PartitionSpec(), frame.rules.pool(frame.mesh)
    of_kv = jax.tree.map(lambda _: pool and pool.spec, kv)
    places = (everywhere, of_kv, _spec_of_passed(frame))
    return by_the_compiler(run, frame, places, outer, blocks, kv, x, passed, fed, asked)


def put_rows(first: Array, all: Array, *some: Array) -> Array:
    """Of all layers [L, ...], with what some of them made, from layer `first` on."""
    at = (first, *(0 for _ in some[0].shape))
    return lax.dynamic_update_slice(all, jnp.stack(some), at)


def alike(all: Counts, some: Sequence[Counts]) -> list[Counts]:
    """What some layers read, with account of the pages they met where that is kept for any layer:
    a layer that does not say it met none that were not verified before.
    """
    if all.met is None:
        assert not any(one.met is not None for one in some), "what was met would not be verified"
        return list(some)
    none = jnp.zeros(all.met.shape[1:], all.met.dtype)
    return [dataclasses.replace(one, met=none) if one.met is None else one for one in some]


def by_heads(frame: Frame) -> NamedSharding | None:
    """Where counts [L, B, H] lie between programs; None without a mesh."""
    if frame.mesh is None:
        return None
    heads = frame.rules.axis("kv_heads", frame.mesh)
    spec = PartitionSpec() if heads is None else PartitionSpec(None, None, heads)
    return NamedSharding(frame.mesh, spec)


def _spec_of_passed(frame: Frame) -> Any:
    """Where `Passed` lies between programs."""
    heads, everywhere = by_heads(frame), PartitionSpec()
    return Passed(everywhere, everywhere, heads and heads.spec)  # type: ignore[arg-type]


def embedded(frame: Frame, outer: Params, x: Array, layer: Array, tokens: Array) -> Array:
    """What comes into these layers: before the first, the tokens' embedding."""
    return lax.cond(
        layer == 0,
        lambda: llama.embed(outer, frame.config, tokens).astype(x.dtype),
        lambda: x,
    )


@functools.partial(jax.jit, static_argnames=("frame",), donate_argnames=("x",))
@under_own_settings
def queries(
    outer: Params,
    blocks: tuple[Params, ...],
    kv: PagedKV,
    x: Float[Array, "B T E"],
    layer: Int[Array, ""],
    fed: Fed,
    asked: Asked,
    *,
    frame: Frame,
) -> tuple[Array, Array, tuple[Float[Array, "B n H D"], ...]]:
    """What consecutive layers ask at tokens whose keys and values are in the cache already.

    Args:
      outer, blocks, x, fed, asked, frame: as in `layers`.
      kv: of these layers; it stays as it is.
      layer: the first of them.

    Returns:
      what the last of them made, the layer that comes next, and each layer's queries, rotated,
      unscaled.
    """

    def run(frame: Frame, outer: Params, blocks: Any, kv: PagedKV, *rest: Any) -> Any:
        x, layer, fed, asked = rest
        x = embedded(frame, outer, x, layer, fed.tokens)
        memory = asked.memory(kv, fed.table)
        made = _run(frame, blocks, x, asked.plans, memory, fed.count, write=False)
        x, layer = laid((made.x.astype(x.dtype), layer + len(blocks)), whole(frame.mesh))
        return x, layer, tuple(q[:, fed.take] for q in made.queries)

    everywhere = PartitionSpec()
    places = (everywhere, everywhere, everywhere)
    return by_the_compiler(run, frame, places, outer, blocks, kv, x, layer, fed, asked)


@functools.partial(jax.jit, static_argnames=("frame",))
@under_own_settings
def logits(outer: Params, last: Float[Array, "B E"], *, frame: Frame) -> Float[Array, "B V"]:
    """Logits, float32, of what the last layer made of a token of each sequence."""

    def run(frame: Frame, outer: Params, last: Array) -> Array:
        return laid(llama.head(outer, frame.config, last), whole(frame.mesh))

    return by_the_compiler(run, frame, PartitionSpec(), outer, last)


SCORED = 64
"""Tokens whose logits are in memory at once when a prompt is scored."""


@functools.partial(jax.jit, static_argnames=("best", "frame"))
@under_own_settings
def scores(
    outer: Params,
    x: Float[Array, "B T E"],
    targets: Int[Array, "B T"],
    *,
    best: int,
    frame: Frame,
) -> tuple[Float[Array, "B T"], Int[Array, "B T n"], Float[Array, "B T n"]]:
    """What the model expected behind each token.

    Args:
      outer: see `llama.outer_params`.
      x: what the last layer made of them.
      targets: the tokens that follow.
      best: n, of the likeliest.
      frame: what is static.

    Returns:
      log-probabilities of these, float32; and ids and log-probabilities of the likeliest, best
      first.
    """

    def some(args: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        x, targets = args
        logits = llama.head(outer, frame.config, x).astype(jnp.float32)
        total = jax.nn.logsumexp(logits, axis=-1)
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - total
        alternatives = likeliest(logits, total, best)
        return own, alternatives.ids, alternatives.logprobs

    def run(frame: Frame, outer: Params, x: Array, targets: Array) -> Any:
        b, t, e = x.shape
        n = min(t, SCORED)
        split = x.reshape(b, t // n, n, e).swapaxes(0, 1), targets.reshape(b, -1, n).swapaxes(0, 1)
        made = lax.map(some, split)
        joined = jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(b, t, *y.shape[3:]), made)
        return laid(joined, whole(frame.mesh))

    return by_the_compiler(run, frame, (PartitionSpec(),) * 3, outer, x, targets)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Going:
    """How far each sequence of a decoding batch is; donated.

    Attributes:
      token: its last token, sampled or given.
      running: whether it is to go on.
      length: tokens that its cache holds before those that the step feeds.
      count: tokens that the step feeds; in a step of decoding, 1 where the sequence goes on.
      sampler: see `sampler.init_sampler`.
    """

    token: Int[Array, "B 1"]
    running: Bool[Array, " B"]
    length: Int[Array, " B"]
    count: Int[Array, " B"]
    sampler: SamplerState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Row:
    """What one step chose.

    Attributes:
      token: int32 [B]; -1 for a sequence that had ended, or whose logits were not finite.
      logprob: float32 [B], of the model's own distribution.
      alternatives: the likeliest tokens, [B, n], or None.
      length, count: int32 [B], tokens in the cache before the step, and those that it fed.
      counts: what the step read, [L, B, H].
    """

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]
    alternatives: Alternatives | None
    length: Int[Array, " B"]
    count: Int[Array, " B"]
    counts: Counts


@functools.partial(
    jax.jit, static_argnames=("processors", "frame"), donate_argnames=("passed", "going")
)
@under_own_settings
def end(
    outer: Params,
    passed: Passed,
    going: Going,
    end_ids: Int[Array, "B M"],
    allowed: Bool[Array, " B"],
    *,
    processors: Processors,
    frame: Frame,
) -> tuple[Row, Passed, Going]:
    """The end of a step behind all layers: the next token of every running sequence.

    A sequence ends with an id of its `end_ids` (padded with -1), or when its logits are not finite.
    A sequence that has ended is fed nothing, and writes nothing.

    Args:
      outer: see `llama.outer_params`.
      passed: behind the last layer.
      going: before the step.
      end_ids: ids that end each sequence.
      allowed: sequences that may go on behind this step.
      processors: see `sampler.init_sampler`.
      frame: what is static.

    Returns:
      what was chosen, and the rest for the next step.
    """

    def run(frame: Frame, outer: Params, passed: Passed, *rest: Any) -> Any:
        going, end_ids, allowed = rest
        scores = llama.head(outer, frame.config, passed.last)
        new, logprob, alternatives, sampler = sample(processors, going.sampler, scores)
        new = jnp.where(going.running, new, -1)
        ended = (new < 0) | jnp.any(new[:, None] == end_ids, axis=1)
        running = going.running & ~ended & allowed
        row = Row(new, logprob, alternatives, going.length, going.count, passed.counts)
        nothing = jax.tree.map(jnp.zeros_like, passed.counts)
        going = Going(
            jnp.where(new >= 0, new, going.token[:, 0])[:, None],
            running,
            going.length + going.count,
            running.astype(jnp.int32),
            sampler,
        )
        row, going, last, layer = laid(
            (row, going, passed.last, jnp.zeros_like(passed.layer)), whole(frame.mesh)
        )
        return row, Passed(last, layer, laid(nothing, by_heads(frame))), going

    everywhere = PartitionSpec()
    places = (everywhere, _spec_of_passed(frame), everywhere)
    return by_the_compiler(run, frame, places, outer, passed, going, end_ids, allowed)
