"""What an index says of every key in range, after a scan."""

import dataclasses

from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Scan:
    """Estimated raw scores and how far they may err.

    The error of a key for a row is a sum of products, one factor of the row and one of the key: so
    it need not be written out.

    Attributes:
      estimate: float32 [K, G, T, S], by column; -inf out of range.
      of_row: float32 [K, G, T] each; empty for exact scores.
      of_key: float32 [K, S] each, zeros for keys scored exactly.
    """

    estimate: Float[Array, "K G T S"]
    of_row: tuple[Float[Array, "K G T"], ...] = ()
    of_key: tuple[Float[Array, "K S"], ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the estimates are the scores."""
        return not self.of_row

    @property
    def error(self) -> Float[Array, "K G T S"] | float:
        """A score is above `estimate + error` with the probability stated by the index, at most;
        below `estimate - error` likewise.
        """
        terms = zip(self.of_row, self.of_key, strict=True)
        return sum((row[..., None] * key[:, None, None] for row, key in terms), 0.0)
