"""What an index says of every key in range, after a scan."""

import dataclasses
import functools
import operator
from collections.abc import Iterable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

FAR = 1e30
"""Above every score, and finite: zero times it is zero."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """Estimated raw scores and how far they may err.

    The error of a key for a row is a sum of products, one factor of the row and one of the key: so
    it need not be written out.

    Attributes:
      estimate: float32 [K, G, T, S], by column; -inf out of range.
      of_row: float32 [K, G, T] each; empty for exact scores.
      of_key: float32 [K, S] each, zeros for keys scored exactly.
      deviations: how many standard deviations an error is.
    """

    estimate: Float[Array, "K G T S"]
    of_row: tuple[Float[Array, "K G T"], ...] = ()
    of_key: tuple[Float[Array, "K S"], ...] = ()
    deviations: float = 1.0

    @property
    def exact(self) -> bool:
        """Whether the estimates are the scores."""
        return not self.of_row

    @property
    def error(self) -> Float[Array, "K G T S"] | float:
        """A score is above `estimate + error` with the probability stated by the index, at most;
        below `estimate - error` likewise.
        """
        return 0.0 if self.exact else sum_of_products(self.of_row, self.of_key)

    def worst_of_pages(self, size: int) -> tuple[Float[Array, "K N"], ...]:
        """`of_key`, of the worst key of each page of `size` keys."""
        return tuple(x.reshape(len(x), -1, size).max(-1) for x in self.of_key)

    def by_page(self, estimate: Float[Array, "K G T N"], size: int) -> "Scan":
        """Pages of `size` keys with these estimates: each errs like the worst of its keys."""
        return Scan(estimate, self.of_row, self.worst_of_pages(size), self.deviations)

    def square_above(
        self, size: int, head_dim: int, most: float
    ) -> Float[Array, "K G T N"] | float:
        """How many times the square of its expected weight a key's squared weight is expected to
        be, for the worst key of each page: as a lognormal variable has it; at most e**most.
        """
        if self.exact:
            return 1.0
        error = sum_of_products(self.of_row, self.worst_of_pages(size)) / self.deviations
        return jnp.exp(jnp.minimum(error * head_dim**-0.5 * error * head_dim**-0.5, most))

    def likely(self, head: Array, axis: int, head_dim: int) -> Array:
        """Scores of one head along `axis` (0: K, 1: G, which is kept) that count, in a sum of
        weights, for what the true ones are expected to be: with half the variance added, as the
        mean of a lognormal variable has it, or the error where that is less.
        """
        estimate = lax.dynamic_index_in_dim(self.estimate, head, axis)
        if self.exact:
            return estimate
        error = self._error_of(head, axis)
        return estimate + half_variance(error, self.deviations, head_dim)

    def above_likely(self, head: Array, axis: int, head_dim: int) -> Array:
        """How far true scores of that head may lie above `likely`, at most; not of exact ones."""
        error = self._error_of(head, axis)
        return error - half_variance(error, self.deviations, head_dim)

    def _error_of(self, head: Array, axis: int) -> Array:
        def take(x: Array) -> Array:
            return lax.dynamic_index_in_dim(x, head, axis)

        of_key = [take(x) if axis == 0 else x for x in self.of_key]
        return sum_of_products([take(x) for x in self.of_row], of_key)


def sum_of_products(of_row: Iterable[Array], of_key: Iterable[Array]) -> Float[Array, "K G T S"]:
    """An error, written out."""
    terms = (row[..., None] * key[:, None, None] for row, key in zip(of_row, of_key, strict=True))
    return functools.reduce(operator.add, terms)


def half_variance(error: Array, deviations: float, head_dim: int) -> Array:
    """What is added to a raw score that may err by `error` so that its weight is the expected one;
    at most the error.
    """
    variance = (error / deviations) * head_dim**-0.5 * (error / deviations)
    return jnp.minimum(jnp.minimum(error, variance / 2), FAR)
