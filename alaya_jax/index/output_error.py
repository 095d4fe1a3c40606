"""Which keys keep the output's error below a bound, where the others are answered by page means.

An unread key counts with its estimated weight and the mean value m of its page. Let U be the unread
keys of a page and w their weights, 0 for its other keys: what is missing of the sum of the page's
values is sum (w_j - mean w) (v_j - m), which is nothing where a page's weights are equal. If values
lay in a page without regard to weights, that would have the length

    sqrt(sum (w_j - mean w)^2 / (Z - 1) * sum |v_j - m|^2)

in the mean over their orders: a page's spread R, the root mean square of |v_j - m|, times that of
the weights. Were what pages miss unrelated, the squares of that would add up. But keys that are
attended to hold values that are alike, on one page as on another, and those add up as they are: as
far as values lie in one direction, for which a page's spread R is taken times the share |C| / tr C,
C the covariance of its values and |C| the root of its sum of squares; 1 where they lie on a line,
1 / sqrt(D) where they go everywhere. The two sums together, times `FACTOR`, over all mass and the
output's length, are the estimated error.

Scores that may err make weights that vary, too: the squares are those that are expected.

`FACTOR` is such that true errors stay below the estimate for 99% of heads and queries
(benchmarks/output_error.py; docs/decisions.md says how often, where, and what else was tried).
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from alaya_jax.index.recovery import FURTHER, LOOK, Weights, smallest
from alaya_jax.index.scan import Scan
from alaya_jax.sharding import across

FACTOR = 2.0
"""Estimated errors are this many times the sums over pages; see above."""

_MOST = 60.0  # of a logarithm: sums of exponentials stay finite
_LARGE, _SQUARES = 2.0**30, 30.0  # of weights, and of a logarithm: so do sums of squares
_LEAST = 2.0**-100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summaries:
    """What stands in for the keys that are not read.

    Attributes:
      spread: float32 [K, N, 2], of each page's values: R, and R |C| / tr C; 0 for pages out of
        range.
      known: bool [S], keys whose page has a mean; the others are always read.
    """

    spread: Float[Array, "K N 2"]
    known: Bool[Array, " S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Look:
    """What the output would be, if just some keys were read; of all devices.

    Attributes:
      norm: float32 [K, G, T], its length.
      read: float32 [K, G, T], log of the sum of exp(score / sqrt(D)) over the keys that are read,
        and the window's, by exact scores.
    """

    norm: Float[Array, "K G T"]
    read: Float[Array, "K G T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounded:
    """Keys that keep the error below a bound.

    Attributes:
      kept: bool [K, G, T, S], of the eligible keys those of at least some estimated weight; keys
        that are always read are not marked.
      missing: float32 [K, G, T], log of what the sum of exp(score / sqrt(D)) * value over all keys
        is estimated to miss, as a length; -inf for nothing.
      weights: of all keys.
      looked_at: bool [K, G, T, S], keys of the second look, which need not be kept.
    """

    kept: Bool[Array, "K G T S"]
    missing: Float[Array, "K G T"]
    weights: Weights
    looked_at: Bool[Array, "K G T S"]


def keep_below(
    scan: Scan,
    summaries: Summaries,
    seed: Float[Array, "K G T"],
    error: float | jax.Array,
    head_dim: int,
    look: Callable[[Weights, Bool[Array, "K G T S"]], Look],
    axis: str | None = None,
) -> Bounded:
    """The fewest keys, by estimated weight, whose output is estimated to err by at most `error`.

    There are two looks. The first takes the output's length and the mass from the window and the
    means alone. The second reads what that would keep, which gives nearly the answer's length, less
    what it may still err by, and the mass of those keys exactly.

    Args:
      scan: -inf for keys that are not eligible (the window's).
      summaries: of the pages.
      seed: best raw score of the window; -inf without one.
      error: of the output, relative to its length; 0 keeps every eligible key. A number, or
        [K, G, T], or what broadcasts to it.
      head_dim: D.
      look: what keeping the keys of a mask gives.
      axis: mesh axis that the keys are split over.
    """
    scale = head_dim**-0.5
    best = jnp.maximum(across(lax.pmax, jnp.max(scan.estimate, axis=-1), axis), seed)
    weights = Weights.of(scan, best, head_dim)
    weight, best = weights.weight, weights.best
    error = jnp.broadcast_to(jnp.asarray(error, jnp.float32), best.shape)
    unread = _Unread.of(weight, scan, summaries, head_dim)
    nothing, everything = jnp.full_like(best, -jnp.inf), jnp.full_like(best, jnp.inf)

    kept = functools.partial(weights.within, head_dim=head_dim)

    def sums(beta: Float[Array, "K G T"]) -> tuple[Array, Array, Array]:
        """Of the keys that a range leaves unread what misses, the mass that is there, and more that
        may be.
        """
        found = across(lax.psum, unread.sums(jnp.exp(-scale * beta)), axis)
        apart, along, sure, unsure = found
        return jnp.sqrt(apart) + along, sure, unsure

    of_ones = across(lax.psum, unread.widest(), axis)

    def enough_for(norm: Array, sure: Array, unsure: Array, halvings: int) -> Array:
        """The least range that keeps the bound, for an output of this length and this mass, and
        more that may be there: once that is read, it does not count.
        """
        each = error * norm / FACTOR  # what may miss, of each part of the mass
        spare = each * sure

        def over(betas: list[Array]) -> Float[Array, "n K G T"]:
            found = [sums(beta) for beta in betas]
            return jnp.stack([miss - each * jnp.minimum(left, unsure) for miss, _, left in found])

        end = jnp.log(jnp.maximum(of_ones, _LEAST)) - jnp.log(jnp.maximum(spare, _LEAST))
        end = jnp.maximum(end / scale, 0.0)
        at_none, at_end = over([nothing, end])
        interval = jnp.zeros_like(end), end, at_end
        beta, at = smallest(over, interval, lambda x: x <= spare, halvings, axis)
        for condition, value in (
            (at > spare, everything),
            (at_none <= spare, nothing),
            (spare <= 0, everything),
        ):
            beta = jnp.where(condition, value, beta)
        return beta

    def look_at(kept: Array, beta: Array) -> tuple[Array, Array, Array, Array]:
        found, (missing, sure, unsure) = look(weights, kept), sums(beta)
        read = jnp.exp(jnp.minimum(found.read - scale * best, _MOST))
        return found.norm, read + sure, unsure, missing

    norm, sure, unsure, _ = look_at(kept(nothing), nothing)
    beta = enough_for(norm, sure, unsure, LOOK)
    looked_at = kept(beta)
    norm, sure, unsure, missing = look_at(looked_at, beta)
    whole = sure + unsure
    astray = jnp.where(whole > 0, FACTOR * missing / jnp.where(whole > 0, whole, 1.0), 0.0)
    norm = jnp.maximum(norm - astray, 0.0)
    beta = enough_for(norm, sure, unsure, FURTHER)
    missing = sums(beta)[0]
    return Bounded(kept(beta), jnp.log(FACTOR * missing) + scale * best, weights, looked_at)


@dataclasses.dataclass(frozen=True)
class _Unread:
    """Weights of the keys that have a mean, of which those below a threshold are unread.

    Attributes:
      weight: float32 [K, G, T, Z, N], at most `_LARGE`; 0 for keys that are not eligible. Laid so
        that the keys of a page are added up in whole vectors.
      squares: float32 [K, G, T, N]; see `Scan.square_above`.
      spread: float32 [K, N, 2]; see `Summaries`.
    """

    weight: Float[Array, "K G T Z N"]
    squares: Float[Array, "K G T N"]
    spread: Float[Array, "K N 2"]

    @classmethod
    def of(cls, weight: Float[Array, "K G T S"], scan: Scan, of: Summaries, dim: int) -> "_Unread":
        n = of.spread.shape[1]
        size = weight.shape[-1] // n
        squares = scan.square_above(size, dim, _SQUARES)
        known = jnp.where(of.known, jnp.minimum(weight, _LARGE), 0.0)
        laid = jnp.swapaxes(known.reshape(*weight.shape[:-1], n, size), -1, -2)
        return cls(laid, jnp.broadcast_to(squares, (*weight.shape[:-1], n)), of.spread)

    def widest(self) -> Float[Array, "K G T"]:
        """What misses, at most, of each unit of a threshold."""
        size = self.weight.shape[-2]
        each = jnp.sqrt(self.squares) * self.spread.sum(-1)[:, None, None]
        return size / max(size - 1, 1) ** 0.5 * jnp.sum(each, axis=-1)

    def sums(self, least: Float[Array, "K G T"]) -> Float[Array, "4 K G T"]:
        """Over keys of a weight below `least`: what pages miss, squared, and in one direction; the
        weights over `squares`, which most of lognormal variables exceed, and what is left of their
        means.
        """
        size = self.weight.shape[-2]
        parts = (self.weight[..., slot, :] for slot in range(size))
        unread = [jnp.where(part < least[..., None], part, 0.0) for part in parts]
        once = functools.reduce(operator.add, unread)
        twice = functools.reduce(operator.add, (part * part for part in unread))
        once, twice = lax.optimization_barrier((once, twice))  # each term would add them up anew
        varies = twice * self.squares - once * once / size
        varies = jnp.maximum(varies, 0.0) * (size / max(size - 1, 1))
        length = jnp.sqrt(varies)[..., None] * self.spread[:, None, None]
        apart, along = length[..., 0], length[..., 1]
        terms = apart * apart, along, once / self.squares, once * (1 - 1 / self.squares)
        return jnp.stack([jnp.sum(term, axis=-1) for term in terms])


def spread_of(
    v: Float[Array, "K N Z D"], valid: Bool[Array, "1 N Z 1"], mean: Float[Array, "K N D"]
) -> Float[Array, "K N 2"]:
    """How far the valid values of each page lie from its mean: R, and R |C| / tr C.

    With n of them, |C|^2 is taken to be sum over i != j of <v_i - m, v_j - m>^2 / (n (n - 1)): with
    i = j left out, the few values of a page do not pass for as many directions.
    """
    apart = jnp.where(valid, v - mean[:, :, None], 0.0)
    most = jnp.max(jnp.abs(apart), axis=(2, 3), keepdims=True)
    apart = apart / jnp.where(most > 0, most, 1.0)  # fourth powers stay finite
    products = jnp.einsum("knid,knjd->knij", apart, apart, precision=lax.Precision.HIGHEST)
    others = jnp.where(jnp.eye(v.shape[2], dtype=bool), 0.0, products)
    n = jnp.sum(valid, axis=(2, 3), dtype=jnp.float32)
    spread = jnp.sqrt(jnp.sum(apart * apart, axis=(2, 3)) / jnp.maximum(n, 1.0))
    square = jnp.sum(others * others, axis=(2, 3)) / jnp.maximum(n * (n - 1), 1.0)
    along = jnp.minimum(jnp.sqrt(square) / jnp.where(spread > 0, spread, 1.0), spread)
    return most[:, :, 0] * jnp.stack([spread, along], axis=-1)
