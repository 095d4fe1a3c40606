"""Which keys hold a given share of the attention mass, by estimated scores."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from alaya_jax.attention.partial import across

MARGIN = 0.2
"""Share of the mass that may be lost which is not spent, for the estimates' errors."""

_HALVINGS = 14
_AT_ONCE = 2
"""Halvings with one exchange of masses, where the keys are split over devices: 7 exchanges; the
three thresholds that two halvings may ask for are weighed together.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recovered:
    """A range of scores that keeps a share of the mass.

    Attributes:
      beta: float32 [K, G, T], the range below the best score (of the window's too).
      mass: float32 [K, G, T], estimated share of the attention mass in the window and the kept.
      kept: bool [K, G, T, S], `estimate >= best - beta`.
    """

    beta: Float[Array, "K G T"]
    mass: Float[Array, "K G T"]
    kept: Bool[Array, "K G T S"]


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
    best = jnp.where(jnp.isneginf(best), 0.0, best)  # no key at all
    target = jnp.asarray(recovery + margin * (1 - recovery), jnp.float32)
    weight = jnp.exp(scale * (estimate - best[..., None]))
    window = jnp.exp(window_lse - scale * best)

    def masses(beta: Float[Array, "K G T n"]) -> Float[Array, "K G T n"]:
        kept = estimate[..., None, :] >= (best[..., None] - beta)[..., None]
        held = jnp.sum(jnp.where(kept, weight[..., None, :], 0.0), axis=-1)
        return window[..., None] + across(lax.psum, held, axis)

    # 2**-23: the smallest share that float32 tells from nothing.
    keys = across(lax.psum, jnp.sum(estimate > -jnp.inf, axis=-1), axis)
    widest = jnp.log(jnp.maximum(keys, 1)) - jnp.log(jnp.maximum(1 - target, 2.0**-23))
    widest = jnp.broadcast_to(widest / scale, best.shape)
    zero = jnp.zeros_like(best)
    ends = masses(jnp.stack([zero, widest, jnp.full_like(best, jnp.inf)], axis=-1))
    at_zero, at_widest, total = jnp.moveaxis(ends, -1, 0)
    parts = 2 if axis is None else 2**_AT_ONCE

    def narrow(_: Array, interval: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, at_high = interval
        step = (high - low) / parts
        held = masses(low[..., None] + step[..., None] * jnp.arange(1, parts))
        first = jnp.sum(held < (target * total)[..., None], axis=-1)  # that holds enough
        held = jnp.concatenate([held, at_high[..., None]], axis=-1)
        at_high = jnp.take_along_axis(held, first[..., None], axis=-1)[..., 0]
        return low + step * first, low + step * (first + 1), at_high

    rounds = _HALVINGS if axis is None else _HALVINGS // _AT_ONCE
    _, beta, held = lax.fori_loop(0, rounds, narrow, (zero, widest, at_widest))
    for condition, value, mass in (
        (at_zero >= target * total, 0.0, at_zero),
        (target >= 1, jnp.inf, total),
    ):
        beta, held = jnp.where(condition, value, beta), jnp.where(condition, mass, held)
    kept = (estimate >= (best - beta)[..., None]) & (estimate > -jnp.inf)
    return Recovered(beta, jnp.where(total > 0, held / total, 1.0), kept)
