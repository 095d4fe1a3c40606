"""Choosing the next token from logits: pure functions on a batch.

A `Sampling` says what one sequence wants. `init_sampler` turns a batch of them into

- `Processors`: static and hashable, what any sequence of the batch needs; and
- `SamplerState`: a pytree of arrays with every number, so that new numbers never recompile.

`sample` runs under jit and inside `lax.while_loop`. Greedy decoding without penalties costs an
argmax and a logsumexp and carries no [B, V] array. The order of the steps is

    repetition, frequency and presence penalty -> bias -> mask
      -> temperature -> top-k -> top-p -> min-p

and a temperature of 0 takes the argmax after the mask. Ties go to the lowest id, in greedy decoding
and at the edge of top-k and top-p alike, so `top_k=1` is greedy decoding at any temperature.

Log-probabilities are those of the model: softmax of the raw logits, before any step above.

The randomness of a sequence is a function of its `seed` and of its own step number, nothing else:
for equal logits, neither its place in a batch nor what runs beside it changes its tokens. XLA may
sum a row in another order for another batch, which can move the last bit of a log-probability, and
a token that stands on the very edge of top-p.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alaya_jax.errors import RequestError
from alaya_jax.runtime.sampling.params import Sampling, refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processors:
    """What at least one sequence of a batch needs; static under jit.

    Penalties and bias are not named here: `SamplerState` holds their arrays, or None.

    Attributes:
      random, top_k, top_p, min_p: steps that the program has.
      logprobs: alternatives that it reports.
      where_asked: whether it takes a step of these only where a sequence's numbers ask for it: one
        program then serves batches that need less, for their price.
    """

    random: bool
    top_k: bool
    top_p: bool
    min_p: bool
    logprobs: int
    where_asked: bool = False


@dataclasses.dataclass(frozen=True)
class Kind:
    """Processors of a batch, and whether its state holds all [B, V] arrays."""

    processors: Processors
    arrays: bool


ALTERNATIVES = 20
"""Alternatives of the smallest `Kind` that has any; more are this times a power of four."""


def kind_of(each: Sequence[Sampling], vocab_size: int) -> Kind:
    """The first of a few kinds, each with more than the one before, that serves all of these: of
    all temperatures and filters; with penalties and alternatives; with more alternatives.

    Where sequences come and go, a program for each set of what they need would be compiled again
    and again; here who joins can only lead to a kind that one of them needs anyway. What a sequence
    does not need leaves it as it is.
    """
    penalties = any(
        s.logit_bias or s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
        for s in each
    )
    wanted = max(s.logprobs for s in each)
    everything = bool(penalties or wanted)
    count = ALTERNATIVES if everything else 0
    while count < wanted:
        count *= 4
    processors = Processors(
        random=True,
        top_k=True,
        top_p=True,
        min_p=True,
        logprobs=min(count, vocab_size),
        where_asked=True,
    )
    return Kind(processors, everything)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerState:
    """The numbers of a batch of sequences, and what was generated so far.

    The [B, V] arrays are None where no sequence needs them. So is the mask, which holds for one
    step: without another no token is allowed in the next.
    """

    temperature: jax.Array  # f32 [B]
    top_k: jax.Array  # i32 [B]
    top_p: jax.Array  # f32 [B]
    min_p: jax.Array  # f32 [B]
    repetition: jax.Array  # f32 [B]
    presence: jax.Array  # f32 [B]
    frequency: jax.Array  # f32 [B]
    key: jax.Array  # typed PRNG key [B]
    step: jax.Array  # i32 [B]: tokens sampled so far
    bias: jax.Array | None  # f32 [B, V]
    prompt: jax.Array | None  # bool [B, V]: the token occurs in the prompt
    counts: jax.Array | None  # i32 [B, V]: occurrences in the output
    mask: jax.Array | None = None  # u32 [B, W]: ids that may be chosen next, see `Allowed.mask`


class Alternatives(NamedTuple):
    """The most likely tokens under the model, best first: ids i32 and logprobs f32, [..., n]."""

    ids: jax.Array
    logprobs: jax.Array


def init_sampler(
    sampling: Sampling | Sequence[Sampling],
    prompts: Sequence[Any],
    vocab_size: int,
    outputs: Sequence[Any] | None = None,
    kind: Kind | None = None,
) -> tuple[Processors, SamplerState]:
    """The static and the dynamic half of a batch's sampling, before its first token.

    Args:
      sampling: one for the whole batch, or one per sequence.
      prompts: token ids of each sequence [n], everything that precedes the first sampled token.
      vocab_size: V, the last axis of the logits.
      outputs: token ids of each sequence [n] that were sampled before and count as its output.
      kind: what the batch is to have, see `kind_of`; None: what it needs.

    Raises:
      RequestError: number of samplings and prompts differ, or an id or a count exceeds V.
    """
    batch = len(prompts)
    each = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
    if batch == 0 or len(each) != batch:
        raise RequestError(
            f"sampling: {len(each)} Sampling for {batch} prompts; give one, or one for each prompt"
        )
    for s in each:
        check_vocabulary(s, vocab_size)
    arrays = kind is not None and kind.arrays

    def column(name: str, dtype: Any = np.float32) -> np.ndarray:
        return np.array([getattr(s, name) for s in each], dtype)

    repetition, presence = column("repetition_penalty"), column("presence_penalty")
    frequency, temperature = column("frequency_penalty"), column("temperature")
    top_k, top_p, min_p = column("top_k", np.int32), column("top_p"), column("min_p")
    warm = temperature > 0  # filters do not touch a greedy sequence: they keep its argmax
    needed = Processors(
        random=bool(warm.any()),
        top_k=bool((warm & (top_k > 0) & (top_k < vocab_size)).any()),
        top_p=bool((warm & (top_p < 1)).any()),
        min_p=bool((warm & (min_p > 0)).any()),
        logprobs=max(s.logprobs for s in each),
    )
    processors = needed if kind is None else kind.processors
    prompt = bias = counts = None
    if arrays or (repetition != 1).any():
        prompt = np.zeros((batch, vocab_size), bool)
        for row, ids in zip(prompt, prompts, strict=True):
            ids = np.asarray(ids, np.int64).reshape(-1)
            if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
                raise RequestError(
                    f"prompt has token ids {ids.min()} to {ids.max()}, but the vocabulary is "
                    f"0 to {vocab_size - 1}; encode it with this model's tokenizer"
                )
            row[ids] = True
    if arrays or any(s.logit_bias for s in each):
        bias = np.zeros((batch, vocab_size), np.float32)
        for row, s in zip(bias, each, strict=True):
            for i, b in dict(s.logit_bias).items():
                row[i] = b
    if prompt is not None or (presence != 0).any() or (frequency != 0).any():
        counts = np.zeros((batch, vocab_size), np.int32)
        for row, ids in zip(counts, outputs or (), strict=False):
            np.add.at(row, np.asarray(ids, np.int64), 1)
    masked = any(s.is_masked for s in each)
    mask = np.zeros((batch, -(-vocab_size // 32)), np.uint32) if masked else None
    # The generator is named, so that jax's global default does not change a stored result. The data
    # of its keys is what `jax.random.key(seed)` makes of 32 bits, without a program for it.
    seeds = column("seed", np.uint32)
    keys = np.stack([np.zeros_like(seeds), seeds], axis=-1)
    state = SamplerState(
        temperature=jax.device_put(temperature),
        top_k=jax.device_put(top_k),
        top_p=jax.device_put(top_p),
        min_p=jax.device_put(min_p),
        repetition=jax.device_put(repetition),
        presence=jax.device_put(presence),
        frequency=jax.device_put(frequency),
        key=jax.random.wrap_key_data(jax.device_put(keys), impl="threefry2x32"),
        step=jax.device_put(np.zeros(batch, np.int32)),
        bias=None if bias is None else jax.device_put(bias),
        prompt=None if prompt is None else jax.device_put(prompt),
        counts=None if counts is None else jax.device_put(counts),
        mask=None if mask is None else jax.device_put(mask),
    )
    return processors, state


def check_vocabulary(sampling: Sampling, vocab_size: int) -> None:
    """Raises RequestError where a sampling asks for ids that a vocabulary of V has not."""
    if sampling.logprobs > vocab_size:
        raise refused("logprobs", sampling.logprobs, f"at most the vocabulary, {vocab_size}")
    biased = dict(sampling.logit_bias)
    for name, ids in (("logit_bias", biased), ("stop_ids", sampling.stop_ids)):
        if ids and max(ids) >= vocab_size:
            raise refused(name, max(ids), f"token ids below the vocabulary, {vocab_size}")
    if sum(b == -math.inf for b in biased.values()) == vocab_size:
        raise refused("logit_bias", "-inf for every token", "-inf for fewer tokens")


def sample(
    processors: Processors, state: SamplerState, logits: jax.Array
) -> tuple[jax.Array, jax.Array, Alternatives | None, SamplerState]:
    """The next token of every sequence. Pure; jit with `processors` static.

    A sequence without a distribution - its logits hold NaN or +inf, or no token is left that may be
    chosen - gets token -1 with log-probability NaN, and its counts stay as they were; the caller
    must stop it. The others are not affected.

    Args:
      processors: from `init_sampler`.
      state: from `init_sampler` or the step before.
      logits: [B, V], any float type; all arithmetic is float32.

    Returns:
      token i32 [B]; its log-probability under the model f32 [B]; the `processors.logprobs` most
      likely tokens under the model, or None when that is 0; the state for the next step.
    """
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    scores = process_logits(processors, state, logits)
    if processors.random:
        # Gumbel-max: no cumulative distribution is needed, and noise by token id keeps a sequence's
        # draw the same whichever filters its neighbours in the batch switch on.
        warm = state.temperature > 0

        def noisy(scores: jax.Array) -> jax.Array:
            noise = jax.vmap(_noise, (0, 0, None))(state.key, state.step, scores.shape[-1])
            return scores + jnp.where(warm[:, None], noise, 0)

        scores = _where_asked(processors, warm, noisy, scores)
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)

    valid = jnp.isfinite(total) & (_at(scores, token) > -jnp.inf)
    logprob = jnp.where(valid, _at(logits, token) - total, jnp.nan)
    counts = state.counts
    if counts is not None:
        counts = counts.at[jnp.arange(token.shape[0]), token].add(valid.astype(counts.dtype))
    alternatives = None
    if processors.logprobs:
        alternatives = likeliest(logits, total, processors.logprobs)
    mask = None if state.mask is None else jnp.zeros_like(state.mask)
    state = dataclasses.replace(state, step=state.step + 1, counts=counts, mask=mask)
    return jnp.where(valid, token, -1), logprob, alternatives, state


def likeliest(logits: jax.Array, total: jax.Array, n: int) -> Alternatives:
    """The n most likely tokens of logits [..., V], whose log-sum-exp is `total` [...]."""
    best, ids = lax.top_k(logits, n)
    return Alternatives(ids.astype(jnp.int32), best - total[..., None])


def process_logits(processors: Processors, state: SamplerState, logits: jax.Array) -> jax.Array:
    """Logits after every step, f32 [B, V]: a sequence's token is drawn from their softmax.

    Excluded tokens are -inf. For a greedy sequence the argmax is what counts.
    """
    scores = logits.astype(jnp.float32)
    if state.counts is not None:
        generated = state.counts > 0
        if state.prompt is not None:
            penalty = state.repetition[:, None]
            damped = jnp.where(scores > 0, scores / penalty, scores * penalty)
            scores = jnp.where(state.prompt | generated, damped, scores)
        scores = scores - state.frequency[:, None] * state.counts
        scores = scores - state.presence[:, None] * generated
    if state.bias is not None:
        scores = scores + state.bias
    if state.mask is not None:
        scores = jnp.where(_bits(state.mask, scores.shape[-1]), scores, -jnp.inf)
    if not processors.random:
        return scores
    warm = state.temperature > 0
    return _where_asked(
        processors, warm, lambda scores: _filtered(processors, state, scores), scores
    )


def _filtered(processors: Processors, state: SamplerState, scores: jax.Array) -> jax.Array:
    """Scores divided by temperature, without those that the filters exclude."""
    warm = state.temperature > 0

    def top_k(scores: jax.Array) -> jax.Array:
        wanted = jnp.where(state.top_k > 0, state.top_k.astype(jnp.float32), jnp.inf)
        return _keep_best(scores, jnp.ones_like(scores), wanted)

    def top_p(scores: jax.Array) -> jax.Array:
        weight = jnp.exp(scores)
        wanted = jnp.where(state.top_p < 1, state.top_p * weight.sum(-1), jnp.inf)
        return _keep_best(scores, weight, wanted)

    def min_p(scores: jax.Array) -> jax.Array:  # the most likely token stands at 0
        return jnp.where(scores >= jnp.log(state.min_p)[:, None], scores, -jnp.inf)

    # The peak goes first: a small temperature then sends the rest to -inf, and none to +inf.
    peak = jnp.max(scores, axis=-1, keepdims=True)
    scores = (scores - peak) / jnp.where(warm, state.temperature, 1)[:, None]
    for has, asked, change in (
        (processors.top_k, state.top_k > 0, top_k),
        (processors.top_p, state.top_p < 1, top_p),
        (processors.min_p, state.min_p > 0, min_p),
    ):
        if has:
            scores = _where_asked(processors, warm & asked, change, scores)
    return scores


def _where_asked(
    processors: Processors,
    asked: jax.Array,
    change: Callable[[jax.Array], jax.Array],
    scores: jax.Array,
) -> jax.Array:
    """`change(scores)`; see `Processors.where_asked`."""
    if not processors.where_asked:
        return change(scores)
    return lax.cond(jnp.any(asked), change, lambda scores: scores, scores)


def _bits(mask: jax.Array, size: int) -> jax.Array:
    """Of each row the first `size` bits, the lowest of a word first."""
    bits = mask[:, :, None] >> jnp.arange(32, dtype=mask.dtype) & 1
    return bits.reshape(len(mask), -1)[:, :size] > 0


def _noise(key: jax.Array, step: jax.Array, size: int) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(key, step), (size,), jnp.float32)


def _at(rows: jax.Array, token: jax.Array) -> jax.Array:
    # Twice each: see `models.matrices.take_rows`.
    return jnp.take_along_axis(rows, jnp.stack([token, token], axis=-1), axis=-1)[:, 0]


def _keep_best(scores: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """Keeps each row's best scores until their weight reaches `wanted`; the rest become -inf.

    Ties at the edge are kept from the lowest id on. Instead of sorting V scores, bisect the edge
    over the 32 bits of a float: 32 masked sums of a row, about 15 times faster than a sort on a CPU
    at V = 49,152, and on a mesh a sum over shards instead of a gather of the vocabulary.

    Args:
      scores: f32 [B, V], no NaN.
      weight: f32 [B, V], not negative.
      wanted: f32 [B], positive; inf keeps the row as it is.
    """
    bits = lax.bitcast_convert_type(scores + 0.0, jnp.int32)  # + 0.0 makes -0.0 equal to 0.0
    rank = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)  # ordered as the scores are

    def halve(_, edges):
        low, high = edges  # the edge is in [low, high]
        middle = (low | high) - ((low ^ high) >> 1)  # their mean rounded up, without overflow
        enough = jnp.where(rank >= middle[:, None], weight, 0).sum(-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    ends = jnp.iinfo(jnp.int32)
    start = (jnp.full_like(rank[:, 0], ends.min), jnp.full_like(rank[:, 0], ends.max))
    edge = lax.fori_loop(0, 32, halve, start)[0][:, None]
    above = jnp.where(rank > edge, weight, 0)
    tied = jnp.where(rank == edge, weight, 0)
    before = above.sum(-1, keepdims=True) + jnp.cumsum(tied, axis=-1) - tied
    kept = (rank > edge) | ((rank == edge) & (before < wanted[:, None]))
    return jnp.where(kept, scores, -jnp.inf)
