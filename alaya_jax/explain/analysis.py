"""The last token's attention once more, timed and held against full attention, layer by layer.

The token's key and value are in the cache already. So nothing is written: the model runs over the
token with a cache that it only reads.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from alaya_jax.attention import engine
from alaya_jax.attention.counts import Counts
from alaya_jax.cache import PageTable
from alaya_jax.cache.tiers import Pool
from alaya_jax.errors import RequestError
from alaya_jax.explain.reads import known
from alaya_jax.explain.truth import Truth, truth
from alaya_jax.index import Graphs, LayerIndex
from alaya_jax.index.memory import Memory
from alaya_jax.query import DIPR, Full, Tiles
from alaya_jax.query.plan import Plan, Plans, of_layer
from alaya_jax.runtime.batch import Batch
from alaya_jax.runtime.programs import Fed
from alaya_jax.runtime.reading import Reading
from alaya_jax.sharding import laid, whole

REPEATS = 5
"""Timed calls of a layer's attention; the median is reported."""

WANTED = 0.95
"""Share of the mass that "needed" figures are for, where nothing asks for one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """One query token, every layer; a token's numbers say little of other tokens.

    Attributes:
      plans: how attention was answered.
      sequence, position: which query token.
      wanted: the share of the mass that `beta_needed` and `keys_needed` are for.
      seconds, seconds_full: float64 [L], a layer's attention by the plan and in full, as jitted
        calls of their own: what a call costs is in both.
      attended, keys_needed: int64 [L, H], keys.
      scored: int64 [L, H], keys (or pages) scored to choose them.
      read: int64 [L, K], keys outside the window whose K was read.
      estimated: float64 [L, H], share of the mass as estimated by the plan's scan; or NaN.
      recovery: float64 [L, H], the true share.
      error: float64 [L, H], |out - full| / |full|.
      error_estimated, error_asked: float64 [L, H], what the plan's scan estimated, and at most
        asked for; or NaN.
      beta, beta_needed: float64 [L, H]; see `Truth`.
      positions, retrieved: L x H arrays of ascending positions: keys attended to, and those of
        them outside the window.
      tokens: ids of the sequence's tokens.
      decode: token ids -> text; None without a tokenizer.
    """

    plans: Plans
    sequence: int
    position: int
    wanted: float
    seconds: np.ndarray
    seconds_full: np.ndarray
    attended: np.ndarray
    keys_needed: np.ndarray
    scored: np.ndarray
    read: np.ndarray
    estimated: np.ndarray
    recovery: np.ndarray
    error: np.ndarray
    error_estimated: np.ndarray
    error_asked: np.ndarray
    beta: np.ndarray
    beta_needed: np.ndarray
    positions: tuple[tuple[np.ndarray, ...], ...]
    retrieved: tuple[tuple[np.ndarray, ...], ...]
    tokens: np.ndarray
    decode: Callable[[Any], str] | None

    @property
    def violations(self) -> np.ndarray:
        """bool [L, H], where the error is larger than was asked for."""
        return self.error > self.error_asked  # nothing is larger than NaN

    def layer(self, layer: int) -> dict[str, Any]:
        """Of one layer; lists have one number a query head, `keys_read` one a kv head."""
        estimated = self.estimated[layer]
        return {
            "layer": layer,
            "plan": str(of_layer(self.plans, layer)),
            "seconds": float(self.seconds[layer]),
            "seconds_full": float(self.seconds_full[layer]),
            "keys_visible": self.position + 1,
            "keys_scanned": self.scored[layer].tolist(),
            "keys_read": self.read[layer].tolist(),
            "keys_attended": self.attended[layer].tolist(),
            "keys_needed": self.keys_needed[layer].tolist(),
            "recovery": self.recovery[layer].tolist(),
            "mass_estimated": known(estimated),
            "error": self.error[layer].tolist(),
            "error_estimated": known(self.error_estimated[layer]),
            "error_asked": known(self.error_asked[layer]),
            "beta": self.beta[layer].tolist(),
            "beta_needed": self.beta_needed[layer].tolist(),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON; positions only of retrieved keys."""
        return {
            "sequence": self.sequence,
            "position": self.position,
            "wanted": self.wanted,
            "seconds": float(self.seconds.sum()),
            "seconds_full": float(self.seconds_full.sum()),
            "recovery_mean": float(self.recovery.mean()),
            "recovery_least": float(self.recovery.min()),
            "error_mean": float(self.error.mean()),
            "error_violations": int(self.violations.sum()),
            "layers": [self.layer(i) for i in range(len(self.seconds))],
            "retrieved": [[at.tolist() for at in heads] for heads in self.retrieved],
        }

    def text(self, positions: Any) -> list[tuple[int, str]]:
        """(position, text of its token), for a list of positions.

        Raises:
          RequestError: the model has no tokenizer.
        """
        if self.decode is None:
            raise RequestError("the model has no tokenizer, so positions have no text")
        return [(int(at), self.decode([int(self.tokens[at])])) for at in positions]


def analyze(
    batch: Batch,
    plans: Plans,
    sequence: int = 0,
    wanted: float = WANTED,
    repeats: int = REPEATS,
) -> Analysis:
    """Runs the last cached token of one sequence again by these plans.

    Args:
      batch: where the token is.
      plans: how its attention is answered.
      sequence: of a batch, which.
      wanted: share of the mass that "needed" figures are for, where a plan asks for none.
      repeats: timed calls of a layer's attention; 0: none is timed, and the seconds are NaN.

    Raises:
      RequestError: the sequence is empty, the ids of its tokens are not known, or there is no such
        sequence; or the plan is for a prefill.
    """
    if not 0 <= sequence < batch.size:
        raise RequestError(
            f"explain(sequence={sequence}): the session has {batch.size} sequences, counted from 0"
        )
    layers = batch.model.config.num_hidden_layers
    if any(isinstance(of_layer(plans, i).query, Tiles) for i in range(layers)):
        raise RequestError(
            "explain(analyze=True) runs one token, and Tiles answers for blocks of them; name "
            "another with attention=..."
        )
    held, tokens = batch.sequences[sequence], batch.tokens[sequence]
    if held.length == 0:
        raise RequestError(
            "explain(analyze=True) runs the last token in the cache again, and there is none; "
            "call prefill or generate first"
        )
    if len(tokens) != held.length:
        raise RequestError(
            f"explain(analyze=True): the sequence holds {held.length} tokens and the ids of "
            f"{len(tokens)} are known; update() is not told them"
        )
    pool, model = batch.pool, batch.model
    batch.verify()  # the truth is of all keys
    indexed = batch.cover(plans, [sequence])
    table = pool.table([held])
    before = dataclasses.replace(table, length=table.length - 1)
    stack = batch.stack
    one = Fed(tokens[None, -1:], np.ones(1, np.int32), before)  # type: ignore[arg-type]
    chain = stack.chain(plans, stack.at_cache(indexed), Reading(pool, [held], plans))
    asked = stack.queries(pool.kv, chain, stack.put(one), np.zeros(1, np.int32))
    q = list(asked)  # of each layer [1, 1, H, D]
    shares = [_wanted(of_layer(plans, i), wanted) for i in range(layers)]
    rows = []
    whole_layers = Reading(pool, [held], Plan(Full()))
    with pool.here():
        for layer in range(layers):
            whole_layers.before(layer, 1)
            plan, index = of_layer(plans, layer), indexed.layers[layer]
            memory = Memory(pool.kv, before, indexed).layer(layer)
            attend = functools.partial(
                engine.attend,
                q=q[layer],
                count=jnp.ones(1, jnp.int32),
                mesh=pool.mesh,
                rules=pool.rules,
            )
            (out, counts), seconds = _timed(functools.partial(attend, plan, memory=memory), repeats)
            plain = dataclasses.replace(memory, index=None)
            full = functools.partial(attend, Plan(Full()), memory=plain)
            if isinstance(plan.query, Full) or not repeats:
                seconds_full = seconds
            else:
                seconds_full = _timed(full, repeats)[1]
            everywhere = whole(pool.mesh)
            pages, local = _on_one(memory.pools, table, index, pool.num_pages, everywhere)
            true = truth(
                plan,
                q[layer][0, 0],
                pages,
                table.length[0],
                local,
                indexed.covered[0],
                np.float32(shares[layer]),
            )
            # Of several processes each reads them.
            true, out, counts = _laid((true, out, counts), everywhere)
            rows.append(_row(true, out, counts, seconds, seconds_full, held.length))
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for row, i in zip(rows, range(layers), strict=True):
        row["error_asked"] = _asked(of_layer(plans, i), heads)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    stacked = {n: np.stack(x) for n, x in columns.items() if n not in ("positions", "retrieved")}
    stacked["read"] = stacked["read"].reshape(layers, kv_heads, heads // kv_heads)[:, :, 0]
    return Analysis(
        plans=plans,
        sequence=sequence,
        position=held.length - 1,
        wanted=shares[0],
        positions=tuple(columns["positions"]),
        retrieved=tuple(columns["retrieved"]),
        tokens=tokens,
        decode=model.tokenizer.decode if model.tokenizer else None,
        **stacked,
    )


def _wanted(plan: Plan, otherwise: float) -> float:
    recovery = plan.query.recovery if isinstance(plan.query, DIPR) else None
    return otherwise if recovery is None else float(np.max(np.asarray(recovery)))


def _asked(plan: Plan, heads: int) -> np.ndarray:
    """float64 [H], the error that a plan promises to keep; NaN without one."""
    error = plan.query.error if isinstance(plan.query, DIPR) else None
    return np.broadcast_to(np.asarray(np.nan if error is None else error, np.float64), heads)


def _row(
    true: Truth, out: Array, counts: Counts, seconds: float, full: float, length: int
) -> dict[str, Any]:
    got, want = np.asarray(out[0, 0], np.float64), np.asarray(true.out, np.float64)
    # Columns ascend with positions; those past the last token hold nothing.
    position = np.asarray(true.position)
    norm = np.linalg.norm(want, axis=-1)

    def at(mask: Array) -> tuple[np.ndarray, ...]:
        found = (position[row] for row in np.asarray(mask))
        return tuple(x[x < length] for x in found)

    return {
        "seconds": np.float64(seconds),
        "seconds_full": np.float64(full),
        "attended": np.asarray(true.attended.sum(-1), np.int64),
        "keys_needed": np.asarray(true.keys_needed, np.int64),
        "scored": np.asarray(counts.scored[0, 0], np.int64),
        "read": np.asarray(counts.read[0, 0], np.int64),
        "estimated": np.asarray(counts.mass[0, 0], np.float64),
        "recovery": np.asarray(true.recovery, np.float64),
        "error": np.linalg.norm(got - want, axis=-1) / np.where(norm > 0, norm, 1.0),
        "error_estimated": np.asarray(counts.error[0, 0], np.float64),
        "beta": np.asarray(true.beta, np.float64),
        "beta_needed": np.asarray(true.beta_needed, np.float64),
        "positions": at(true.attended),
        "retrieved": at(true.retrieved),
    }


def _timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """The result, and the median of some calls after a first one."""
    result, times = jax.block_until_ready(call()), []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return result, float(np.median(times)) if times else float("nan")


def _on_one(
    pools: tuple[Pool, Pool],
    table: PageTable,
    index: LayerIndex | Graphs | None,
    num_pages: int,
    everywhere: NamedSharding | None,
) -> tuple[tuple[Pool, Pool, Array, Array | None], LayerIndex | Graphs | None]:
    """A layer's pages, and its index, as one device of the context axis would hold them all."""
    (k, v), ids = pools, table.pages[0]
    if table.start is None:
        return (k, v, ids, None), index
    assert isinstance(k, jax.Array)  # mapped files are not read over a mesh
    # Entries count from the first page of the device that they lie on; order them by position.
    ids, start = map(np.asarray, _laid((ids, table.start[0]), everywhere))
    shards = _shards_of(k, num_pages)
    shard = np.repeat(np.arange(shards), len(start) // shards)
    order = np.argsort(start, kind="stable")
    pages = (ids + shard * (num_pages // shards))[order]
    copy = functools.partial(_take_pages, pages=pages, place=everywhere)
    own, start = _laid((np.arange(len(pages)), start[order]), everywhere)
    return (copy(k), copy(v), own, start), jax.tree.map(copy, index)


def _shards_of(pool: Array, num_pages: int) -> int:
    return num_pages // pool.sharding.shard_shape(pool.shape)[1]


@functools.partial(jax.jit, static_argnames="place")
def _take_pages(pool: Array, pages: Array, place: NamedSharding | None) -> Array:
    return laid(pool[:, pages], place)


@functools.partial(jax.jit, static_argnames="place")
def _laid(tree: Any, place: NamedSharding | None) -> Any:
    return laid(tree, place)
