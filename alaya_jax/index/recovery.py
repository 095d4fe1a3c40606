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
    whatever the scores: S keys, each of weight below (1 - target) / S of the best. It is exact to
    2**-14 of that interval: a key may be kept whose score is that much lower than needed.

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

    def mass(beta: Array) -> Array:
        kept = estimate >= (best - beta)[..., None]
        held = jnp.sum(jnp.where(kept, weight, 0.0), axis=-1)
        return window + across(lax.psum, held, axis)

    total = mass(jnp.full_like(best, jnp.inf))

    def halve(_: Array, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) / 2
        enough = mass(middle) >= target * total
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # 2**-23: the smallest share that float32 tells from nothing.
    keys = estimate.shape[-1] * (1 if axis is None else lax.axis_size(axis))
    widest = (jnp.log(keys) - jnp.log(jnp.maximum(1 - target, 2.0**-23))) / scale
    _, beta = lax.fori_loop(
        0, _HALVINGS, halve, (jnp.zeros_like(best), jnp.broadcast_to(widest, best.shape))
    )
    beta = jnp.where(mass(jnp.zeros_like(best)) >= target * total, 0.0, beta)
    beta = jnp.where(target >= 1, jnp.inf, beta)
    kept = (estimate >= (best - beta)[..., None]) & (estimate > -jnp.inf)
    return Recovered(beta, jnp.where(total > 0, mass(beta) / total, 1.0), kept)
