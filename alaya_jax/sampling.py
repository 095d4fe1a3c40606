"""Choosing the next token from logits: what a user may ask for, and the pure functions that do it.

A `Sampling` says what one sequence wants. `init_sampler` turns a batch of them into

- `Processors`: static and hashable, what any sequence of the batch needs; and
- `SamplerState`: a pytree of arrays with every number, so that new numbers never recompile.

`sample` runs under jit and inside `lax.while_loop`. Greedy decoding without penalties costs an
argmax and a logsumexp and carries no [B, V] array. The order of the steps is

    repetition, frequency and presence penalty -> bias -> temperature -> top-k -> top-p -> min-p

and a temperature of 0 takes the argmax after the bias. Ties go to the lowest id, in greedy decoding
and at the edge of top-k and top-p alike, so `top_k=1` is greedy decoding at any temperature.

Log-probabilities are those of the model: softmax of the raw logits, before any step above.

The randomness of a sequence is a function of its `seed` and of its own step number, nothing else:
for equal logits, neither its place in a batch nor what runs beside it changes its tokens. XLA may
sum a row in another order for another batch, which can move the last bit of a log-probability, and
a token that stands on the very edge of top-p.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alaya_jax.errors import RequestError

# Field: (lowest, highest, what is allowed in words). Zero temperature is let through apart.
_FLOATS = {
    "temperature": (1e-5, 1e5, "0 (greedy) or 1e-5 to 1e5"),
    "top_p": (1e-6, 1.0, "1e-6 to 1 (1 keeps all)"),
    "min_p": (0.0, 1.0, "0 to 1 (0 keeps all)"),
    "repetition_penalty": (1e-5, 1e5, "1e-5 to 1e5 (1 changes nothing)"),
    "presence_penalty": (-2.0, 2.0, "-2 to 2 (0 changes nothing)"),
    "frequency_penalty": (-2.0, 2.0, "-2 to 2 (0 changes nothing)"),
}
_INTS = {
    "top_k": (0, 2**31 - 1, "0 (keeps all) or a count of tokens"),
    "seed": (0, 2**32 - 1, "0 to 2**32 - 1"),
    "logprobs": (0, 2**31 - 1, "0 or a count of alternatives"),
}


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Sampling:
    """How the tokens of one sequence are chosen.

    Attributes:
        temperature: Divides the logits; 0 is greedy decoding.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of most likely tokens whose probability reaches p, after top-k
            (Holtzman et al., 2020, section 3.1).
        min_p: Keep tokens at least min_p times as likely as the most likely (Nguyen et al., 2024).
        repetition_penalty: Positive logits of tokens in the prompt or the output are divided by it,
            negative ones multiplied (Keskar et al., 2019, section 4.1).
        presence_penalty: Subtracted once from the logit of every token already in the output.
        frequency_penalty: Subtracted once per occurrence in the output.
        logit_bias: Added to the logits of these ids; `-inf` forbids a token. A mapping is stored as
            a sorted tuple of pairs, so that a `Sampling` stays hashable.
        seed: Seed of the sequence. Equal seeds and logits give equal tokens.
        logprobs: How many of the most likely alternatives to report with each token.
        stop: Strings that end the output; the string itself is not part of it.
        stop_ids: Token ids that end the output.
        ignore_eos: Do not stop at the model's end-of-sequence tokens.

    Raises:
        RequestError: A value is of a wrong type or out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        def put(name: str, value: Any):
            object.__setattr__(self, name, value)

        for name, (low, high, allowed) in _FLOATS.items():
            value = getattr(self, name)
            if not _is(value, numbers.Real):
                raise _refused(name, value, f"a number, {allowed}")
            if not (low <= value <= high or (name == "temperature" and value == 0)):
                raise _refused(name, value, allowed)
            put(name, float(value))
        for name, (low, high, allowed) in _INTS.items():
            value = getattr(self, name)
            if not (_is(value, numbers.Integral) and low <= value <= high):
                raise _refused(name, value, f"a whole number, {allowed}")
            put(name, int(value))
        if not isinstance(self.ignore_eos, bool):
            raise _refused("ignore_eos", self.ignore_eos, "True or False")
        put("logit_bias", _bias_pairs(self.logit_bias))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not (isinstance(stop, Sequence) and all(isinstance(s, str) and s for s in stop)):
            raise _refused("stop", stop, "a list of strings that are not empty")
        put("stop", tuple(stop))
        ids = self.stop_ids
        if not (
            isinstance(ids, Sequence) and all(_is(i, numbers.Integral) and i >= 0 for i in ids)
        ):
            raise _refused("stop_ids", ids, "a list of token ids")
        put("stop_ids", tuple(int(i) for i in ids))

    def __repr__(self) -> str:
        said = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"Sampling({', '.join(said)})"

    def end_ids(self, eos_ids: Sequence[int]) -> tuple[int, ...]:
        """The ids that end this sequence's output, given the model's end-of-sequence ids."""
        return tuple(sorted({*self.stop_ids, *(() if self.ignore_eos else eos_ids)}))


def Greedy(**controls: Any) -> Sampling:
    """The most likely token at each step: `Sampling(temperature=0, **controls)`."""
    return Sampling(temperature=0.0, **controls)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _refused(name: str, value: Any, allowed: str) -> RequestError:
    return RequestError(f"sampling: {name}={value!r} is not allowed; use {allowed}")


def _bias_pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    allowed = "a mapping of token id to a finite number or -inf, each id once"
    try:
        pairs = [(i, b) for i, b in (bias.items() if isinstance(bias, Mapping) else bias)]
    except (TypeError, ValueError) as error:
        raise _refused("logit_bias", bias, allowed) from error
    for i, b in pairs:
        if not (_is(i, numbers.Integral) and i >= 0 and _is(b, numbers.Real)) or not b < math.inf:
            raise _refused("logit_bias", {i: b}, allowed)
    if len({i for i, _ in pairs}) != len(pairs):
        raise _refused("logit_bias", bias, allowed)
    return tuple(sorted((int(i), float(b)) for i, b in pairs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processors:
    """What at least one sequence of a batch needs; static under jit.

    Penalties and bias are not named here: `SamplerState` holds their arrays, or None.
    """

    random: bool
    top_k: bool
    top_p: bool
    min_p: bool
    logprobs: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerState:
    """The numbers of a batch of sequences, and what was generated so far.

    The [B, V] arrays are None where no sequence needs them.
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


class Alternatives(NamedTuple):
    """The most likely tokens under the model, best first: ids i32 [B, n], logprobs f32 [B, n]."""

    ids: jax.Array
    logprobs: jax.Array


def init_sampler(
    sampling: Sampling | Sequence[Sampling], prompts: Sequence[Any], vocab_size: int
) -> tuple[Processors, SamplerState]:
    """The static and the dynamic half of a batch's sampling, before its first token.

    Args:
        sampling: One for the whole batch, or one per sequence.
        prompts: Token ids of each sequence [n], everything that precedes the first sampled token.
        vocab_size: V, the last axis of the logits.

    Raises:
        RequestError: Number of samplings and prompts differ, or an id or a count exceeds V.
    """
    batch = len(prompts)
    each = [sampling] * batch if isinstance(sampling, Sampling) else list(sampling)
    if batch == 0 or len(each) != batch:
        raise RequestError(
            f"sampling: {len(each)} Sampling for {batch} prompts; give one, or one for each prompt"
        )
    for s in each:
        _check_vocabulary(s, vocab_size)

    def column(name: str, dtype: Any = np.float32) -> np.ndarray:
        return np.array([getattr(s, name) for s in each], dtype)

    repetition, presence = column("repetition_penalty"), column("presence_penalty")
    frequency, temperature = column("frequency_penalty"), column("temperature")
    top_k, top_p, min_p = column("top_k", np.int32), column("top_p"), column("min_p")
    warm = temperature > 0  # filters do not touch a greedy sequence: they keep its argmax
    processors = Processors(
        random=bool(warm.any()),
        top_k=bool((warm & (top_k > 0) & (top_k < vocab_size)).any()),
        top_p=bool((warm & (top_p < 1)).any()),
        min_p=bool((warm & (min_p > 0)).any()),
        logprobs=max(s.logprobs for s in each),
    )
    prompt = bias = counts = None
    if (repetition != 1).any():
        prompt = np.zeros((batch, vocab_size), bool)
        for row, ids in zip(prompt, prompts, strict=True):
            ids = np.asarray(ids, np.int64).reshape(-1)
            if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
                raise RequestError(
                    f"prompt has token ids {ids.min()} to {ids.max()}, but the vocabulary is "
                    f"0 to {vocab_size - 1}; encode it with this model's tokenizer"
                )
            row[ids] = True
    if any(s.logit_bias for s in each):
        bias = np.zeros((batch, vocab_size), np.float32)
        for row, s in zip(bias, each, strict=True):
            for i, b in dict(s.logit_bias).items():
                row[i] = b
    if prompt is not None or (presence != 0).any() or (frequency != 0).any():
        counts = np.zeros((batch, vocab_size), np.int32)
    # The generator is named, so that jax's global default does not change a stored result.
    keys = jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))
    state = SamplerState(
        temperature=jnp.asarray(temperature),
        top_k=jnp.asarray(top_k),
        top_p=jnp.asarray(top_p),
        min_p=jnp.asarray(min_p),
        repetition=jnp.asarray(repetition),
        presence=jnp.asarray(presence),
        frequency=jnp.asarray(frequency),
        key=keys(jnp.asarray(column("seed", np.uint32))),
        step=jnp.zeros(batch, jnp.int32),
        bias=None if bias is None else jnp.asarray(bias),
        prompt=None if prompt is None else jnp.asarray(prompt),
        counts=None if counts is None else jnp.asarray(counts),
    )
    return processors, state


def _check_vocabulary(sampling: Sampling, vocab_size: int):
    if sampling.logprobs > vocab_size:
        raise _refused("logprobs", sampling.logprobs, f"at most the vocabulary, {vocab_size}")
    biased = dict(sampling.logit_bias)
    for name, ids in (("logit_bias", biased), ("stop_ids", sampling.stop_ids)):
        if ids and max(ids) >= vocab_size:
            raise _refused(name, max(ids), f"token ids below the vocabulary, {vocab_size}")
    if sum(b == -math.inf for b in biased.values()) == vocab_size:
        raise _refused("logit_bias", "-inf for every token", "-inf for fewer tokens")


def sample(
    processors: Processors, state: SamplerState, logits: jax.Array
) -> tuple[jax.Array, jax.Array, Alternatives | None, SamplerState]:
    """The next token of every sequence. Pure; jit with `processors` static.

    A sequence without a distribution - its logits hold NaN or +inf, or no token is left that may be
    chosen - gets token -1 with log-probability NaN, and its counts stay as they were; the caller
    must stop it. The others are not affected.

    Args:
        processors: From `init_sampler`.
        state: From `init_sampler` or the step before.
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
        noise = jax.vmap(_noise, (0, 0, None))(state.key, state.step, scores.shape[-1])
        scores = scores + jnp.where(state.temperature[:, None] > 0, noise, 0)
    token = jnp.argmax(scores, axis=-1).astype(jnp.int32)

    valid = jnp.isfinite(total) & (_at(scores, token) > -jnp.inf)
    logprob = jnp.where(valid, _at(logits, token) - total, jnp.nan)
    counts = state.counts
    if counts is not None:
        counts = counts.at[jnp.arange(token.shape[0]), token].add(valid.astype(counts.dtype))
    alternatives = None
    if processors.logprobs:
        best, ids = lax.top_k(logits, processors.logprobs)
        alternatives = Alternatives(ids.astype(jnp.int32), best - total[:, None])
    state = dataclasses.replace(state, step=state.step + 1, counts=counts)
    return jnp.where(valid, token, -1), logprob, alternatives, state


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
    if processors.random:
        # The peak goes first: a small temperature then sends the rest to -inf, and none to +inf.
        peak = jnp.max(scores, axis=-1, keepdims=True)
        scores = (scores - peak) / jnp.where(state.temperature > 0, state.temperature, 1)[:, None]
    if processors.top_k:
        wanted = jnp.where(state.top_k > 0, state.top_k.astype(jnp.float32), jnp.inf)
        scores = _keep_best(scores, jnp.ones_like(scores), wanted)
    if processors.top_p:
        weight = jnp.exp(scores)
        wanted = jnp.where(state.top_p < 1, state.top_p * weight.sum(-1), jnp.inf)
        scores = _keep_best(scores, weight, wanted)
    if processors.min_p:  # the most likely token stands at 0
        scores = jnp.where(scores >= jnp.log(state.min_p)[:, None], scores, -jnp.inf)
    return scores


def _noise(key: jax.Array, step: jax.Array, size: int) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(key, step), (size,), jnp.float32)


def _at(rows: jax.Array, token: jax.Array) -> jax.Array:
    # Twice each: see `models.kernels.take_rows`.
    return jnp.take_along_axis(rows, jnp.stack([token, token], axis=-1), axis=-1)[:, 0]


def _keep_best(scores: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
    """Keep each row's best scores until their weight reaches `wanted`; the rest become -inf.

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


class StopText:
    """Cuts streamed text at the first stop string, however the text is split into pieces.

    The string that is complete first wins, and of two complete at once the longer.
    """

    def __init__(self, stop: Sequence[str]):
        self.stop = tuple(stop)
        self.stopped = False
        self._held = ""  # may turn out to be the start of a stop string

    def put(self, text: str) -> str:
        """Take the next piece; return what is now known to be part of the output."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(s), at) for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        longest = max((len(s) - 1 for s in self.stop), default=0)
        ends = (text[-n:] for n in range(min(longest, len(text)), 0, -1))
        self._held = next((e for e in ends if any(s.startswith(e) for s in self.stop)), "")
        return text[: len(text) - len(self._held)]

    def flush(self) -> str:
        """What was held back, once the text has ended."""
        held, self._held = self._held, ""
        return held
