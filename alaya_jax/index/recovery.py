"""Which keys hold a given share of the attention mass, by estimated scores."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from alaya_jax.index.scan import Scan
from alaya_jax.sharding import across

MARGIN = 0.2
"""Share of the mass that may be lost which is not spent: an expectation may be exceeded."""

BOUND = -math.log1p(-MARGIN)
"""Added to the log of an expected mass, for one that is seldom exceeded."""

ALONE = 0.25
"""Share of the mass that may be lost which a key that is not read may seem to hold, at most."""

_PARTS = 8
_LEAST = 2.0**-126  # of a weight: the least normal float32
_MOST = 60.0  # of a weight's logarithm: sums of them stay finite
_ABOVE_ALL = math.exp(_MOST)
_HALVINGS = 14
LOOK, FURTHER = 8, 8
"""Halvings for a first look at the keys, which need not be exact, and for a second."""
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
        that are not eligible. Of a score that may err, the expected weight (`Scan.likely`), which
        may be above 1.
      best: float32 [K, G, T], a raw score.
    """

    weight: Float[Array, "K G T S"]
    best: Float[Array, "K G T"]

    @classmethod
    def of(cls, scan: Scan, best: Float[Array, "K G T"], head_dim: int) -> "Weights":
        """Of raw scores, -inf for keys that are not eligible, in their place if they end here."""
        scale = head_dim**-0.5
        best = jnp.where(jnp.isneginf(best), 0.0, best)  # no key at all

        def weigh(scores: Array, head: Array, axis: int) -> Array:
            of_head = dataclasses.replace(scan, estimate=scores).likely(head, axis, head_dim)
            top = lax.dynamic_index_in_dim(best, head, axis)
            log = jnp.minimum(scale * (of_head - top[..., None]), _MOST)
            # An eligible key's weight is never 0, so that it tells which keys are.
            return jnp.where(log > -jnp.inf, jnp.maximum(jnp.exp(log), _LEAST), 0.0)

        return cls(_by_head(weigh, scan.estimate), best)

    def raised(self, scan: Scan, mass: Float[Array, "K G T"], head_dim: int) -> "Weights":
        """With keys that may weigh as much as `mass`, by their error bars, above all others."""
        scale = head_dim**-0.5

        def lift(weights: Array, head: Array, axis: int) -> Array:
            of_head = lax.dynamic_index_in_dim(weights, head, axis)
            least = lax.dynamic_index_in_dim(mass, head, axis)[..., None]
            # A weight is that of `likely`, so it may be too small by what is left of the error.
            least *= jnp.exp(-scale * scan.above_likely(head, axis, head_dim))
            return jnp.where((of_head >= least) & (of_head > 0), _ABOVE_ALL, of_head)

        return Weights(_by_head(lift, self.weight), self.best)

    def within(self, beta: Float[Array, "K G T"], head_dim: int) -> Bool[Array, "K G T S"]:
        """The eligible keys of a weight of at least `exp(-beta / sqrt(D))`."""
        least = jnp.exp(-(head_dim**-0.5) * beta)[..., None]
        return (self.weight >= least) & (self.weight > 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recovered:
    """A range of scores that keeps a share of the mass.

    Attributes:
      beta: float32 [K, G, T], the range below the best score (of the window's too).
      mass: float32 [K, G, T], share of the attention mass in the window and the kept, at least.
      unread: float32 [K, G, T], log of the sum of exp(score / sqrt(D)) over the other eligible
        keys, at most: what is expected with the margin on top of it; -inf where there are none.
      kept: bool [K, G, T, S], eligible and of a weight of at least exp(-beta / sqrt(D)) of the
        best's: `estimate >= best - beta`, but for what rounds to the same weight. And those that
        are kept for their error bars.
      weights: of all keys; of those that are kept for their error bars, above all others.
    """

    beta: Float[Array, "K G T"]
    mass: Float[Array, "K G T"]
    unread: Float[Array, "K G T"]
    kept: Bool[Array, "K G T S"]
    weights: Weights


def recover(
    scores: Scan | Float[Array, "K G T S"],
    window_lse: Float[Array, "K G T"],
    seed: Float[Array, "K G T"],
    recovery: float | jax.Array,
    head_dim: int,
    margin: float | jax.Array = MARGIN,
    axis: str | None = None,
    held: Callable[[Bool[Array, "K G T S"]], Float[Array, "K G T"]] | None = None,
) -> Recovered:
    """The smallest `beta >= 0` whose keys, with the window's, hold `recovery` of the mass.

    The mass aimed at is `recovery + margin * (1 - recovery)`.

    `beta` is found by halving an interval whose end drops at most the mass that may be dropped,
    whatever the scores: n eligible keys, each of weight below (1 - target) / n of the best. It is
    exact to 2**-14 of that interval: a key may be kept whose score is that much lower than needed.
    Each halving weighs the keys once. Weights, once computed, stand in place of the estimates, and
    thresholds are compared with them: a pass reads one array, and writes none of its size.

    Estimates cannot be taken at their word: the largest are those that err upwards, and of an
    unread key the true weight may be many times the estimated. So there are two looks. The first
    keeps what seems to be enough, and every key that by its error bar may hold `ALONE` of what may
    be lost: a sum of many errors is as expected, that of a few is not. `held` counts it exactly.
    The unread keys count with their expected weight, and the second look goes on until what they
    hold is a small enough part of what was counted: which it is then, since more is read than was
    counted. Where the estimates are exact the first look is all.

    Args:
      scores: raw, -inf for keys that are not eligible (the window's); as an array, exact.
      window_lse: log of the sum of exp(score / sqrt(D)) over the window; -inf without one.
      seed: best raw score of the window; -inf without one.
      recovery: p in (0, 1]; 1 keeps every eligible key.
      head_dim: D.
      margin: see above; 0 trusts the estimates.
      axis: mesh axis that the keys are split over; `window_lse` and `seed` are of all.
      held: gives the log of the sum of exp(score / sqrt(D)) over the window and the keys of a mask,
        of all devices, by exact scores. None: scores count as what they are expected to be.
    """
    scale = head_dim**-0.5
    scan = scores if isinstance(scores, Scan) else Scan(scores)
    best = jnp.maximum(across(lax.pmax, jnp.max(scan.estimate, axis=-1), axis), seed)
    target = jnp.asarray(recovery + margin * (1 - recovery), jnp.float32)
    lost = jnp.maximum(1 - target, 0.0)  # of the mass, at most
    exact = scan.exact or held is None

    weights = Weights.of(scan, best, head_dim)
    weight, best = weights.weight, weights.best
    window = jnp.exp(window_lse - scale * best)

    def of_range(betas: list[Float[Array, "K G T"]], inside: bool) -> Float[Array, "n K G T"]:
        """The mass of the keys in each range, or of the others."""

        def one(beta: Array) -> Array:
            least = jnp.exp(-scale * beta)[..., None]
            return _sum(weight, lambda part: jnp.where((part >= least) == inside, part, 0.0))

        return across(lax.psum, jnp.stack([one(beta) for beta in betas]), axis)

    def search(
        low: Array, high: Array, at_high: Array, inside: bool, enough: Any, halvings: int
    ) -> tuple[Array, Array]:
        """The smallest beta whose mass is `enough`, and that mass."""
        masses = functools.partial(of_range, inside=inside)
        return smallest(masses, (low, high, at_high), enough, halvings, axis)

    # 2**-23: the smallest share that float32 tells from nothing.
    keys = across(lax.psum, _sum(weight, lambda part: (part > 0).astype(jnp.float32)), axis)
    log_keys = jnp.log(jnp.maximum(keys, 1))
    widest = (log_keys - jnp.log(jnp.maximum(1 - target, 2.0**-23))) / scale
    widest = jnp.broadcast_to(widest, best.shape)
    zero, everything = jnp.zeros_like(best), jnp.full_like(best, jnp.inf)
    at_zero, at_widest, total = of_range([zero, widest, everything], True)
    needed = target * (window + total) - window
    beta, mass = search(
        zero, widest, at_widest, True, lambda x: x >= needed, _HALVINGS if exact else LOOK
    )
    for condition, value, other in (
        (at_zero >= needed, zero, at_zero),
        (target >= 1, everything, total),
    ):
        beta, mass = jnp.where(condition, value, beta), jnp.where(condition, other, mass)
    read, unread = window + mass, jnp.maximum(total - mass, 0.0)

    if not exact:
        assert held is not None
        weights = weights.raised(scan, ALONE * lost * (window + total), head_dim)
        weight = weights.weight
        read = jnp.exp(jnp.minimum(held(weights.within(beta, head_dim)) - scale * best, _MOST))
        spare = read * lost / target
        unread = of_range([beta], False)[0]

        def further() -> tuple[Array, Array]:
            widest = (log_keys - jnp.log(jnp.maximum(spare, _LEAST))) / scale
            widest = jnp.maximum(beta, widest)
            at_widest = of_range([widest], False)[0]
            wider, left = search(beta, widest, at_widest, False, lambda x: x <= spare, FURTHER)
            enough = left <= spare
            wider = jnp.where(enough, wider, jnp.inf)
            left = jnp.where(enough, left, 0.0)
            short = unread > spare
            return jnp.where(short, wider, beta), jnp.where(short, left, unread)

        if axis is None:
            beta, unread = lax.cond(jnp.any(unread > spare), further, lambda: (beta, unread))
        else:
            beta, unread = further()
        unread = unread / (1 - margin)  # at most, and so not only as expected
    whole = read + unread
    return Recovered(
        beta,
        jnp.where(whole > 0, read / whole, 1.0),
        jnp.log(unread) + scale * best,
        weights.within(beta, head_dim),
        weights,
    )


def smallest(
    values: Callable[[list[Array]], Float[Array, "M ..."]],
    interval: tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]],
    enough: Callable[[Array], Array],
    halvings: int,
    axis: str | None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The smallest number of an interval whose value is enough, to 2**-halvings of it; its value.

    Args:
      values: of some numbers, of all devices.
      interval: its ends, and the value of the upper one, which is enough.
      enough: whether a value is.
      halvings: how often the interval is cut into two.
      axis: mesh axis that `values` asks across: with one, two halvings are one exchange.
    """
    parts = 2 if axis is None else 2**_AT_ONCE

    def narrow(_: Array, interval: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, at_high = interval
        step = (high - low) / parts
        inner = values([low + step * i for i in range(1, parts)])
        first = jnp.sum(~enough(inner), axis=0)  # that is enough
        inner = jnp.concatenate([inner, at_high[None]])
        at_high = jnp.take_along_axis(inner, first[None], axis=0)[0]
        return low + step * first, low + step * (first + 1), at_high

    rounds = halvings if axis is None else halvings // _AT_ONCE
    return lax.fori_loop(0, rounds, narrow, interval)[1:]


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


def _by_head(
    change: Callable[[Array, Array, int], Array], x: Float[Array, "K G T S"]
) -> Float[Array, "K G T S"]:
    """`change(x, head, axis)` in place of each head of x: of one head at a time, in its memory."""
    axis = heads_axis(x)

    def one(head: Array, x: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, change(x, head, axis), head, axis)

    return lax.fori_loop(0, x.shape[axis], one, x)


def _sum(weight: Float[Array, "K G T S"], term: Callable[[Array], Array]) -> Float[Array, "K G T"]:
    """The sum of `term(weight)` over keys, reading `weight` once.

    Parts of the keys are added to each other first, number by number, in one loop that CPUs run on
    whole vectors; what is left is short. XLA would else write the terms out to add them up.
    """
    count = math.gcd(weight.shape[-1], _PARTS)
    parts = weight.reshape(*weight.shape[:-1], count, -1)
    added = functools.reduce(operator.add, (term(parts[..., i, :]) for i in range(count)))
    return jnp.sum(lax.optimization_barrier(added), axis=-1)
