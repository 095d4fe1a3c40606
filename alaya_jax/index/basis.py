"""Coordinates in which a sketch rounds keys, learnt from a model's queries and keys.

A random rotation treats all channels alike; keys are not like that, nor are queries. Take, of one
kv head, S = E[q q'], the second moment of its queries, and T = S^(1/2). A key's residual r becomes
u = V' T r, V the eigenvectors of the second moment of T r, and a query becomes V' T^-1 q: products
are as before, the queries' second moment is the identity, and the u's channels are uncorrelated
with falling variances. So what a channel's rounding errs by is what scores err by, and each next
bit goes to the channel where it removes the most: many get none.

The error. A key's e = s g - u is known when it is rounded. Over queries, <e, q> has the standard
deviation |e| where their second moment is the identity; per query, `sqrt(sum_d q_d^2 sigma_d^2)
|e|`, sigma_d^2 the share of |e|^2 that channel d is expected to have. Scores are taken to err by at
most as many of these as for a random rotation, which they did on held-out text of two models
(benchmarks/sketch_recall.py): unlike there, this is measured and not proven.

The scale s is the one of least square error, so that an estimate is what the score is expected to
be; a random rotation's is the one without bias, which its bound needs.
"""

import dataclasses
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float16, Int, Int8, UInt8, UInt32

from alaya_jax.cache.views import FEW_ROWS
from alaya_jax.index.codes import (
    RoundedQuery,
    deviations,
    length,
    pack,
    to_half,
)

BITS = (0.5, 1, 1.5, 2, 4)
"""Bits a channel on average. A channel has 0 to 8 of them, each with a weight of its own; so a key
is D * bits signs, and products with it are sums over bits, 32 to a word.
"""

_WORD = 32
_PLANES = 8  # bits of a query's integers

_MARGIN = 1.1
"""Standard deviations more, relative to a random rotation: with none, 1 to 2 in 10,000 critical
keys were missed at 1 bit."""

_CENTRE = 7  # largest integer of a page's centre: 4 bits

QUANTIZERS = (
    (0.0, 1.0),
    (1.5957691156522358, 0.3633802286934516),
    (0.9956667097512895, 0.11884605093949865),
    (0.5860247134519477, 0.037439659499708185),
    (0.33518721069312785, 0.011542884639998932),
    (0.18813822620983106, 0.0034952113722256078),
    (0.10406450569999479, 0.0010400454149184293),
    (0.05686791743982492, 0.00030433277195545056),
    (0.030762281567920075, 8.768618611542385e-05),
)
"""By bits, 0 to 8: the distance of 2**bits even levels of least mean square error for standard
normal numbers, and that error (J. Max, Quantizing for minimum distortion, 1960).
"""
_MOST_BITS = len(QUANTIZERS) - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Basis:
    """Of one layer, for sketches of some bits.

    Attributes:
      keys: float32 [K, D, D], makes u of a key's residual.
      queries: float32 [K, D, D], its inverse transposed.
      offset: float32 [K, D], what all keys have in common.
      grain: float32 [K, D], unit of a page's centre in each channel, a power of two.
      unit: float32 [K, D], half the distance of u's levels at a channel's last bit, for a key of
        ordinary length; 0 where it has no bits.
      spread: float32 [K, D], standard deviation of u.
      bits: int32 [K, D], of each channel of u.
      channel, place: int32 [K, F], of each sign: its channel, and how many signs of that channel
        count for less; it counts for 2**place units.
      error: float32 [K, D], sigma above, of length 1.
    """

    keys: Float[Array, "K D D"]
    queries: Float[Array, "K D D"]
    offset: Float[Array, "K D"]
    grain: Float[Array, "K D"]
    unit: Float[Array, "K D"]
    spread: Float[Array, "K D"]
    bits: Int[Array, "K D"]
    channel: Int[Array, "K F"]
    place: Int[Array, "K F"]
    error: Float[Array, "K D"]

    def centre(
        self, mean: Float[Array, "K N D"]
    ) -> tuple[UInt8[Array, "K N D/2"], Float16[Array, "K N"], Float[Array, "K N D"]]:
        """Pages' centres as they are stored: codes, units, and the keys that these stand for."""
        x = (mean - self.offset[:, None]) / self.grain[:, None]
        unit = to_half(jnp.max(jnp.abs(x), axis=-1) / _CENTRE)
        step = unit.astype(jnp.float32)[..., None]
        whole = jnp.clip(jnp.round(x / jnp.where(step > 0, step, 1.0)), -_CENTRE, _CENTRE)
        stands = self.offset[:, None] + whole * step * self.grain[:, None]
        return pack(whole.astype(jnp.int8), 4), unit, stands

    def quantize(
        self, residual: Float[Array, "K N Z D"]
    ) -> tuple[UInt32[Array, "K N W Z"], Float16[Array, "K N Z"], Float[Array, "K N Z"]]:
        """Rounds residuals.

        Returns:
          signs: bit i of word w is sign 32 w + i, set where it is positive; scale s; and spread,
          |e| / sqrt(D).
        """
        heads, n, size, dim = residual.shape
        u = _turned(residual.reshape(heads, n * size, dim), self.keys)
        on = self.bits[:, None] > 0
        z = jnp.where(on, u / self.spread[:, None], 0.0)
        # The key's size beside an ordinary one's.
        count = jnp.sum(on, axis=-1, dtype=jnp.float32)
        own = length(z) / jnp.sqrt(count)
        own = jnp.where(own > 0, own, 1.0)[..., None]
        half = jnp.where(on, jnp.exp2(self.bits[:, None].astype(jnp.float32) - 1), 0.0)
        width = jnp.where(on, 2 * self.unit[:, None], 1.0) * own
        cell = jnp.clip(jnp.floor(u / width), -half, jnp.maximum(half - 1, 0.0))
        level = jnp.where(on, self.unit[:, None] * (2 * cell + 1), 0.0)

        # u may be such that its square is more than float32 holds.
        most = jnp.maximum(jnp.max(jnp.abs(u), axis=-1, keepdims=True), 2.0**-100)
        inner = jnp.sum(level * (u / most), axis=-1, keepdims=True)
        square = jnp.sum(level * level, axis=-1, keepdims=True)
        scale = to_half(most * jnp.maximum(inner, 0.0) / square)
        e = length(scale.astype(jnp.float32) * level - u)

        index = (cell + half).astype(jnp.uint32)
        taken = jnp.take_along_axis(index, self.channel[:, None], axis=-1)
        signs = (taken >> self.place[:, None].astype(jnp.uint32)) & 1
        words = _words(signs).reshape(heads, n, size, -1)
        shape = heads, n, size
        return (
            jnp.swapaxes(words, 2, 3),
            scale.reshape(shape),
            e.reshape(shape) / math.sqrt(dim),
        )

    @staticmethod
    def products(
        codes: UInt32[Array, "K N W Z"], integers: Int8[Array, "K R F"]
    ) -> Float[Array, "K R N Z"]:
        """Sums of integers, each with the sign that a key has for it; exact."""
        heads, rows, _ = integers.shape
        total = jnp.sum(integers, axis=-1, dtype=jnp.int32)
        if rows <= FEW_ROWS:
            # Integers by their own bits: what a word shares with one is counted at once. CPUs run
            # such sums over pages on whole vectors, if the words lie ready.
            codes = lax.optimization_barrier(codes)
            shift = jnp.arange(_PLANES, dtype=jnp.uint8)[:, None, None, None]
            planes = (lax.bitcast_convert_type(integers, jnp.uint8) >> shift) & 1
            planes = _words(planes.astype(jnp.uint32))[..., None, None]  # [8, K, R, W, 1, 1]
            positive: Array = jnp.zeros((), jnp.int32)
            for place in range(_PLANES):
                shared = sum(
                    lax.population_count(codes[:, None, :, w] & planes[place, :, :, w])
                    for w in range(codes.shape[2])
                )
                weight = 1 << place if place < _PLANES - 1 else -(1 << place)
                positive = positive + weight * jnp.asarray(shared, jnp.int32)
        else:
            shift = jnp.arange(_WORD, dtype=jnp.uint32)[:, None]
            signs = ((codes[..., None, :] >> shift) & 1).astype(jnp.int8)
            parts = integers.reshape(heads, rows, -1, _WORD)
            positive = jnp.einsum(
                "knwbz,krwb->krnz", signs, parts, preferred_element_type=jnp.int32
            )
        return (2 * positive - total[..., None, None]).astype(jnp.float32)

    def size(self, k: Float[Array, "K N Z D"]) -> Float[Array, "K N Z"]:
        """Of keys as the basis has them: what rounding in float32 is in proportion to."""
        heads, n, size, dim = k.shape
        flat = (k - self.offset[:, None, None]).reshape(heads, n * size, dim)
        return length(_turned(flat, self.keys)).reshape(heads, n, size)

    def ask(self, q: Float[Array, "K N D"], miss: float) -> RoundedQuery:
        """Rounds queries for a scan: their weights of the signs. `miss`: see `SketchLayer.scan`."""
        dim = q.shape[-1]
        turned = _turned(q, self.queries)
        weight = jnp.take_along_axis(turned * self.unit[:, None], self.channel[:, None], axis=-1)
        weight = weight * jnp.exp2(self.place.astype(jnp.float32))[:, None]
        step = jnp.max(jnp.abs(weight), axis=-1, keepdims=True) / 127
        whole = jnp.round(weight / jnp.where(step > 0, step, 1.0))
        sure = _MARGIN * deviations(miss / 2, dim)
        return RoundedQuery(
            whole.astype(jnp.int8),
            step[..., 0],
            sure * math.sqrt(dim) * length(turned * self.error[:, None]),
            # What is lost has a key's signs, which are as good as random beside it.
            sure * length(weight - step * whole),
        )


@dataclasses.dataclass(frozen=True)
class Turned:
    """What is learnt of one layer, for any number of bits. NumPy arrays, float64.

    Attributes:
      rows: [K, D, D], `Basis.keys` with rows that make channels of standard deviation 1.
      spread: [K, D], falling.
      offset, grain: as in `Basis`.
    """

    rows: np.ndarray
    spread: np.ndarray
    offset: np.ndarray
    grain: np.ndarray

    def basis(self, bits: float) -> Basis:
        """With so many bits a channel on average."""
        dim = self.spread.shape[-1]
        keys = self.rows * self.spread[..., None]
        each = np.stack([share_out(x**2, round(bits * dim)) for x in self.spread])
        channel, place = (np.stack(x) for x in zip(*map(_signs, each), strict=True))
        steps, errors = np.array(QUANTIZERS).T
        sigma = self.spread * np.sqrt(errors[each])
        arrays = {
            "keys": keys,
            "queries": np.linalg.inv(keys).swapaxes(-1, -2),
            "offset": self.offset,
            "grain": self.grain,
            "unit": steps[each] * self.spread / 2,
            "spread": self.spread,
            "error": sigma / np.sqrt((sigma**2).sum(-1, keepdims=True)),
        }
        return Basis(
            bits=jnp.asarray(each, jnp.int32),
            channel=jnp.asarray(channel, jnp.int32),
            place=jnp.asarray(place, jnp.int32),
            **{name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()},
        )

    def digest(self) -> str:
        """Of all that sketches depend on."""
        whole = hashlib.blake2b(digest_size=8)
        for x in (self.rows, self.spread, self.offset, self.grain):
            whole.update(np.ascontiguousarray(x, np.float64).tobytes())
        return whole.hexdigest()


def _turned(x: Float[Array, "K N D"], by: Float[Array, "K D D"]) -> Float[Array, "K N D"]:
    return jnp.einsum("knd,ked->kne", x, by, precision=lax.Precision.HIGHEST)


def share_out(variance: np.ndarray, bits: int) -> np.ndarray:
    """Bits of each channel, int64 [D]: the next goes to the channel of largest error left,
    `variance / 4^bits`, the rule of least total error where levels are many.
    """
    shared = np.zeros(len(variance), np.int64)
    for _ in range(bits):
        left = np.where(shared < _MOST_BITS, variance / 4.0**shared, -1.0)
        shared[np.argmax(left)] += 1
    return shared


def _signs(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Channel and place of each sign, those that count most first."""
    places = [(place, channel) for channel, b in enumerate(bits) for place in range(b)]
    places.sort(key=lambda x: (-x[0], x[1]))
    place, channel = np.array(places).T
    return channel, place


def _words(bits: UInt32[Array, "... F"]) -> UInt32[Array, "... F/32"]:
    """Zeros and ones, 32 to a word, lowest first."""
    parts = bits.reshape(*bits.shape[:-1], -1, _WORD)
    return jnp.sum(parts << jnp.arange(_WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
