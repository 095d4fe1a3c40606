"""Which keys hold a given share of the attention mass, by estimated scores."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from alaya_jax.attention.partial import across

MARGIN = 0.2
"""Share of the mass that may be lost which is not spent, for the estimates' errors."""

_PARTS = 8
_LEAST = 2.0**-126  # of a weight: the least normal float32
_HALVINGS = 14
_AT_ONCE = 2
"""Halvings with one exchange of masses, where the keys are split over devices: 7 exchanges; the
three thresholds that two halvings may ask for are weighed together.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Keys' weights in the softmax, beside that of the best.

    Attributes:
      weight: float32 [K, G, T, S], `exp((score - best) / sqrt(D))`, at least `_LEAST`; 0 for keys
        that are not eligible.
      best: float32 [K, G, T], a raw score.
    """

    weight: Float[Array, "K G T S"]
    best: Float[Array, "K G T"]

    @classmethod
    def of(
        cls, scores: Float[Array, "K G T S"], best: Float[Array, "K G T"], head_dim: int
    ) -> "Weights":
        """Of raw scores, -inf for keys that are not eligible, in their place if they end here."""
        scale = head_dim**-0.5
        best = jnp.where(jnp.isneginf(best), 0.0, best)  # no key at all

        axis = heads_axis(scores)

        def weigh(head: Array, scores: Array) -> Array:
            of_head, top = (lax.dynamic_index_in_dim(x, head, axis) for x in (scores, best))
            log = scale * (of_head - top[..., None])
            # An eligible key's weight is never 0, so that it tells which keys are.
            new = jnp.where(log > -jnp.inf, jnp.maximum(jnp.exp(log), _LEAST), 0.0)
            return lax.dynamic_update_slice_in_dim(scores, new, head, axis)

        return cls(lax.fori_loop(0, scores.shape[axis], weigh, scores), best)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recovered:
    """A range of scores that keeps a share of the mass.

    Attributes:
      beta: float32 [K, G, T], the range below the best score (of the window's too).
      mass: float32 [K, G, T], estimated share of the attention mass in the window and the kept.
      kept: bool [K, G, T, S], eligible and of a weight of at least exp(-beta / sqrt(D)) of the
        best's: `estimate >= best - beta`, but for what rounds to the same weight.
      weights: of the estimates.
    """

    beta: Float[Array, "K G T"]
    mass: Float[Array, "K G T"]
    kept: Bool[Array, "K G T S"]
    weights: Weights


def recover(
    estimate: Float[Array, "K G T S"],
    window_lse: Float[Array, "K G T"],
    seed: Float[Array, "K G T"],
    recovery: float | jax.Array,
    head_dim: int,
    margin: float | jax.Array = MARGIN,
    axis: str | None = None,
) -> Recovered:
    """The smallest `beta >= 0` whose keys, with the window's, hold `recovery` of the mass.

    The mass aimed at is `recovery + margin * (1 - recovery)`. Estimates are taken at their word:
    picking the largest of them favours those that err upwards, so without a margin a little less
    than `recovery` is kept about as often as a little more. On keys of SmolLM2-135M at 4 bits, with
    a window, the default holds the true mass at `recovery` or above for 99% of heads and queries;
    at 2 bits for 84% (benchmarks/sketch_recall.py).

    `beta` is found by halving an interval whose end drops at most the mass that may be dropped,
    whatever the scores: n eligible keys, each of weight below (1 - target) / n of the best. It is
    exact to 2**-14 of that interval: a key may be kept whose score is that much lower than needed.
    Each halving weighs the keys once. Weights, once computed, stand in place of the estimates, and
    thresholds are compared with them: a pass reads one array, and writes none of its size.

    Args:
      estimate: raw scores, -inf for keys that are not eligible (the window's).
      window_lse: log of the sum of exp(score / sqrt(D)) over the window; -inf without one.
      seed: best raw score of the window; -inf without one.
      recovery: p in (0, 1]; 1 keeps every eligible key.
      head_dim: D.
      margin: see above; 0 trusts the estimates.
      axis: mesh axis that the keys are split over; `window_lse` and `seed` are of all.
    """
    scale = head_dim**-0.5
    best = jnp.maximum(across(lax.pmax, jnp.max(estimate, axis=-1), axis), seed)
    target = jnp.asarray(recovery + margin * (1 - recovery), jnp.float32)

    weights = Weights.of(estimate, best, head_dim)
    weight, best = weights.weight, weights.best
    window = jnp.exp(window_lse - scale * best)

    def held(least: Float[Array, "K G T"]) -> Float[Array, "K G T"]:
        return _sum(weight, lambda part: jnp.where(part >= least[..., None], part, 0.0))

    def masses(betas: list[Float[Array, "K G T"]]) -> Float[Array, "n K G T"]:
        each = jnp.stack([held(jnp.exp(-scale * beta)) for beta in betas])
        return window + across(lax.psum, each, axis)

    # 2**-23: the smallest share that float32 tells from nothing.
    keys = across(lax.psum, _sum(weight, lambda part: (part > 0).astype(jnp.float32)), axis)
    widest = jnp.log(jnp.maximum(keys, 1)) - jnp.log(jnp.maximum(1 - target, 2.0**-23))
    widest = jnp.broadcast_to(widest / scale, best.shape)
    zero = jnp.zeros_like(best)
    at_zero, at_widest, total = masses([zero, widest, jnp.full_like(best, jnp.inf)])
    parts = 2 if axis is None else 2**_AT_ONCE

    def narrow(_: Array, interval: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, at_high = interval
        step = (high - low) / parts
        inner = masses([low + step * i for i in range(1, parts)])
        first = jnp.sum(inner < target * total, axis=0)  # that holds enough
        inner = jnp.concatenate([inner, at_high[None]])
        at_high = jnp.take_along_axis(inner, first[None], axis=0)[0]
        return low + step * first, low + step * (first + 1), at_high

    rounds = _HALVINGS if axis is None else _HALVINGS // _AT_ONCE
    _, beta, mass = lax.fori_loop(0, rounds, narrow, (zero, widest, at_widest))
    for condition, value, other in (
        (at_zero >= target * total, 0.0, at_zero),
        (target >= 1, jnp.inf, total),
    ):
        beta, mass = jnp.where(condition, value, beta), jnp.where(condition, other, mass)
    kept = (weight >= jnp.exp(-scale * beta)[..., None]) & (weight > 0)
    return Recovered(beta, jnp.where(total > 0, mass / total, 1.0), kept, weights)


def of_pages(scores: Float[Array, "*R S"], size: int, head_dim: int) -> Float[Array, "*R N"]:
    """The score of a key that would have the mass of its page's keys together: pages of `size`
    count with it where they are retrieved.
    """
    scale = head_dim**-0.5
    in_pages = scores.reshape(*scores.shape[:-1], -1, size)
    return jax.nn.logsumexp(scale * in_pages, axis=-1) / scale


def heads_axis(x: Float[Array, "K G ..."]) -> int:
    """The axis for a loop over heads: of the kv heads, or of the group if there is but one of them.
    XLA takes a loop of one for none, and then does anew what the loop was to do once.
    """
    return 0 if x.shape[0] > 1 else 1


def _sum(weight: Float[Array, "K G T S"], term: Callable[[Array], Array]) -> Float[Array, "K G T"]:
    """The sum of `term(weight)` over keys, reading `weight` once.

    Parts of the keys are added to each other first, number by number, in one loop that CPUs run on
    whole vectors; what is left is short. XLA would else write the terms out to add them up.
    """
    count = math.gcd(weight.shape[-1], _PARTS)
    parts = weight.reshape(*weight.shape[:-1], count, -1)
    added = functools.reduce(operator.add, (term(parts[..., i, :]) for i in range(count)))
    return jnp.sum(lax.optimization_barrier(added), axis=-1)
