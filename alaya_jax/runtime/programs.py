"""The two compiled programs of a running model: `extend` a sequence, `decode` many tokens.

Both take the cache, give it back, and donate it: it is updated in place, never copied. Sizes that
vary while a program runs (lengths, number of steps, thresholds) are data; what would compile anew
is a new batch size, chunk size or page-table width, and those come in buckets.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.attention import engine
from alaya_jax.attention.counts import Counts
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.index import Indexed
from alaya_jax.index.memory import Memory
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.llama import Params, forward
from alaya_jax.query import Full
from alaya_jax.query.plan import Attention, Plan, Plans, of_layer, plan_for
from alaya_jax.runtime.sampling.sampler import Alternatives, Processors, SamplerState, sample
from alaya_jax.settings import under_own_settings
from alaya_jax.sharding import ShardingRules, auto_axes, laid, whole


@under_own_settings
def step(
    params: Params,
    config: LlamaConfig,
    kv: PagedKV,
    table: PageTable,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    plans: Attention,
    indexed: Indexed | None = None,
    rope_length: int | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[Float[Array, "B V"], PagedKV, Counts]:
    """The model over `count[b]` new tokens of each sequence; pure, not compiled.

    Args:
      params, config: the model.
      kv: cache; the pages of the new tokens are allocated and in `table`.
      table: pages, and lengths before the new tokens.
      tokens: padded to T.
      count: how many of the T are real.
      plans: how attention is answered; a query or a plan, or one a layer.
      indexed: what the plans' indexes hold; None: nothing, and every key is scored.
      rope_length: see `models.rope.inverse_frequencies`.
      mesh, rules: where the model and the cache lie.

    Returns:
      logits of each sequence's last new token, float32; the cache with the new tokens; what was
      read, [L, B, H], summed over the new tokens.

    Raises:
      RequestError: plans that are none, or not of this model's layers or heads.
    """
    if mesh is not None and (auto := auto_axes(mesh)) is not mesh:
        # With explicit axes every array says where it lies; here the compiler places them.
        pool = (rules or ShardingRules()).pool(auto)
        assert pool is not None
        of_kv = jax.tree.map(lambda _: pool.spec, kv)

        def placed(params: Params, kv: PagedKV, *rest: Any) -> Any:
            static: Any = {"rope_length": rope_length, "mesh": auto, "rules": rules}
            return step(params, config, kv, *rest, **static)

        run: Any = jax.sharding.auto_axes(
            placed,
            axes=mesh.axis_names,
            out_sharding=(PartitionSpec(), of_kv, PartitionSpec()),
        )
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(params, kv, table, tokens, count, plans, indexed)
    plans = plan_for(plans, config, 0)
    offset = jnp.arange(tokens.shape[1])
    positions = table.length[:, None] + offset
    real = (offset < count[:, None])[..., None]

    def attend(layer: int, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        kv, counts = state
        kv = engine.append(kv, layer, k, v, table, count, mesh=mesh, rules=rules)
        out, new = engine.attend(
            of_layer(plans, layer),
            q,
            Memory(kv, table, indexed).layer(layer),
            count,
            mesh=mesh,
            rules=rules,
        )
        new = jax.tree.map(lambda x: jnp.sum(jnp.where(real, x, 0), axis=1), new)
        return out, (kv, (*counts, new))

    logits, (kv, counts) = forward(
        params,
        config,
        tokens,
        positions,
        attend,
        (kv, ()),
        logits_at=jnp.maximum(count - 1, 0),
        rope_length=rope_length,
    )
    return logits, kv, jax.tree.map(lambda *x: jnp.stack(x), *counts)


@functools.partial(
    jax.jit,
    static_argnames=("config", "rope_length", "mesh", "rules"),
    donate_argnames=("kv",),
)
def extend(
    params: Params,
    kv: PagedKV,
    table: PageTable,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    plans: Plans,
    indexed: Indexed | None = None,
    *,
    config: LlamaConfig,
    rope_length: int | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[Float[Array, "B V"], PagedKV, Counts]:
    """`step`, compiled: one chunk of a prefill."""
    logits, kv, counts = step(
        params, config, kv, table, tokens, count, plans, indexed, rope_length, mesh, rules
    )
    logits, counts = laid((logits, counts), whole(mesh))
    return logits, laid(kv, (rules or ShardingRules()).pool(mesh)), counts


@functools.partial(jax.jit, static_argnames=("config", "rope_length", "mesh", "rules"))
def asked(
    params: Params,
    kv: PagedKV,
    table: PageTable,
    tokens: Int[Array, "B T"],
    count: Int[Array, " B"],
    take: Int[Array, " n"],
    *,
    config: LlamaConfig,
    rope_length: int | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> Float[Array, "L n H D"]:
    """Queries that tokens ask whose keys and values are in the cache already, which stays as it is.

    Args:
      params, config, rope_length, mesh, rules: as in `step`.
      kv, table: cache, and the length before these tokens of the (single) sequence.
      tokens, count: as in `step`.
      take: which of the T tokens' queries are wanted.

    Returns:
      those queries, rotated, unscaled, of each layer.
    """
    positions = table.length[:, None] + jnp.arange(tokens.shape[1])

    def attend(layer: int, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        del k, v
        out, _ = engine.attend(
            Plan(Full()), q, Memory(kv, table).layer(layer), count, mesh=mesh, rules=rules
        )
        return out, (*state, q[0, take])

    _, queries = forward(
        params,
        config,
        tokens,
        positions,
        attend,
        (),
        logits_at=count - 1,
        rope_length=rope_length,
    )
    return jnp.stack(queries)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one call of `decode` produced; the first `steps` rows are real.

    Attributes:
      tokens: int32 [N, B]; -1 for a sequence that had ended, or whose logits were not finite.
      logprobs: float32 [N, B], of the model's own distribution.
      alternatives: the likeliest tokens of each step, [N, B, n], or None.
      steps: how many steps ran: fewer than asked for when every sequence ended.
      running: bool [B], sequences that may go on.
      counts: what was read, [L, B, H], summed over steps.
    """

    tokens: Int[Array, "N B"]
    logprobs: Float[Array, "N B"]
    alternatives: Alternatives | None
    steps: Int[Array, ""]
    running: Bool[Array, " B"]
    counts: Counts


@functools.partial(
    jax.jit,
    static_argnames=("config", "processors", "capacity", "rope_length", "mesh", "rules"),
    donate_argnames=("kv", "sampler"),
)
def decode(
    params: Params,
    kv: PagedKV,
    table: PageTable,
    token: Int[Array, " B"],
    running: Bool[Array, " B"],
    end_ids: Int[Array, "B M"],
    sampler: SamplerState,
    steps: Int[Array, ""],
    plans: Plans,
    indexed: Indexed | None = None,
    *,
    config: LlamaConfig,
    processors: Processors,
    capacity: int,
    rope_length: int | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[Decoded, PagedKV, PageTable, Int[Array, " B"], SamplerState]:
    """Up to `steps` tokens of every running sequence, without a host round trip.

    Each step feeds the last token, whose key and value join the cache, and samples the next. A
    sequence ends with an id of its `end_ids` (padded with -1), or when its logits are not finite.

    Args:
      params, config, plans, indexed, rope_length, mesh, rules: as in `step`.
      kv, table: cache with pages allocated for `steps` more tokens of each sequence.
      token: last token of each sequence, sampled or given, not in the cache yet.
      running: sequences that are to go on.
      end_ids: ids that end each sequence.
      sampler, processors: see `sampler.init_sampler`.
      steps: at most `capacity`.
      capacity: N, rows of the result; static.

    Returns:
      the tokens; cache, table, last tokens and sampler for the next call.
    """
    batch = token.shape[0]
    wanted = processors.logprobs
    by_head = (config.num_hidden_layers, batch, config.num_attention_heads)
    nothing = jnp.zeros(by_head, jnp.int32)
    out = Decoded(
        tokens=jnp.full((capacity, batch), -1, jnp.int32),
        logprobs=jnp.zeros((capacity, batch)),
        alternatives=Alternatives(
            jnp.zeros((capacity, batch, wanted), jnp.int32), jnp.zeros((capacity, batch, wanted))
        )
        if wanted
        else None,
        steps=jnp.int32(0),
        running=running,
        counts=Counts(nothing, nothing, nothing, jnp.zeros(by_head), nothing),
    )

    def body(carry: Any) -> Any:
        out, kv, table, token, sampler = carry
        count = out.running.astype(jnp.int32)
        logits, kv, counts = step(
            params,
            config,
            kv,
            table,
            token[:, None],
            count,
            plans,
            indexed,
            rope_length,
            mesh,
            rules,
        )
        table = dataclasses.replace(table, length=table.length + count)
        new, logprob, alternatives, sampler = sample(processors, sampler, logits)
        new = jnp.where(out.running, new, -1)
        ended = (new < 0) | jnp.any(new[:, None] == end_ids, axis=1)
        put = functools.partial(jax.tree.map, lambda rows, row: rows.at[out.steps].set(row))
        out = Decoded(
            tokens=put(out.tokens, new),
            logprobs=put(out.logprobs, logprob),
            alternatives=put(out.alternatives, alternatives),
            steps=out.steps + 1,
            running=out.running & ~ended,
            counts=jax.tree.map(jnp.add, out.counts, counts),
        )
        return out, kv, table, jnp.where(new >= 0, new, token), sampler

    def more(carry: Any) -> Array:
        return (carry[0].steps < jnp.minimum(steps, capacity)) & carry[0].running.any()

    out, kv, new, token, sampler = lax.while_loop(more, body, (out, kv, table, token, sampler))
    out, length, token, sampler = laid((out, new.length, token, sampler), whole(mesh))
    kv = laid(kv, (rules or ShardingRules()).pool(mesh))
    return out, kv, dataclasses.replace(table, length=length), token, sampler
