"""A rotated vector as integers of a few bits and one scale, and how far that is off.

See `sketch.py` for what is made of it, and why.
"""

import dataclasses
import functools
import hashlib
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float16, Int8, UInt8

STEPS = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""Bits -> distance of levels, in standard deviations, of least square error for normal numbers (J.
Max, Quantizing for minimum distortion, 1960); a rotated key's channels are nearly that.
"""

_HALF_MAX = 65504.0  # float16's largest


def quantize(
    residual: Float[Array, "K N Z D"], bits: int
) -> tuple[UInt8[Array, "K N Z D*bits/8"], Float16[Array, "K N Z"], Float[Array, "K N Z"]]:
    """Rotates vectors and rounds them.

    Returns:
      codes, packed; scale s, such that s times the levels is about the rotated vector, without
      bias; and spread, the standard deviation of an inner product's error with a vector of length
      1, float32.
    """
    heads, *_, dim = residual.shape
    u = rotate(residual.reshape(heads, -1, dim)).reshape(residual.shape)
    norm = length(u)[..., None]
    width = STEPS[bits] / math.sqrt(dim) * norm
    half = 2 ** (bits - 1)
    cell = jnp.clip(jnp.floor(u / jnp.where(width > 0, width, 1.0)), -half, half - 1)
    levels = 2 * cell + 1
    inner = jnp.sum(
        levels * u, axis=-1, keepdims=True
    )  # levels have the signs of u: 0 only if u is
    scale = norm * (norm / jnp.where(inner > 0, inner, 1.0))
    stored = to_half(scale)
    # With s as stored, s levels = kept * (u + e): e counts as it is scaled, what is missing of u
    # in full.
    kept = jnp.where(scale > 0, stored.astype(jnp.float32) / jnp.where(scale > 0, scale, 1.0), 1.0)
    e = length(scale * levels - u)[..., None]
    spread = kept * e / math.sqrt(dim - 1) + jnp.abs(1 - kept) * norm
    return pack(cell.astype(jnp.int8), bits), stored[..., 0], spread[..., 0]


def length(x: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """Of vectors whose squares may be more than float32 holds."""
    most = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    unit = x / jnp.where(most > 0, most, 1.0)
    return most[..., 0] * jnp.sqrt(jnp.sum(unit * unit, axis=-1))


def to_half(x: Float[Array, "*N"]) -> Float16[Array, "*N"]:
    """float16; what is too large becomes the largest."""
    return jnp.minimum(x, _HALF_MAX).astype(jnp.float16)


def to_half_above(x: Float[Array, "*N"]) -> Float16[Array, "*N"]:
    """float16, not below x >= 0; infinite when x is too large."""
    return (x * (1 + 2.0**-10) + 2.0**-24).astype(jnp.float16)


def pack(cell: Int8[Array, "... D"], bits: int) -> UInt8[Array, "... D*bits/8"]:
    """Fields of `bits` bits, two's complement; field i of byte m is channel i * bytes + m."""
    fields = cell.reshape(*cell.shape[:-1], 8 // bits, -1).astype(jnp.uint8) & (2**bits - 1)
    shifts = bits * jnp.arange(8 // bits, dtype=jnp.uint8)
    return jnp.sum(fields << shifts[:, None], axis=-2, dtype=jnp.uint8)


def fields(codes: UInt8[Array, "... D*bits/8"], bits: int) -> list[Int8[Array, "... D*bits/8"]]:
    """The 8 / bits fields of each byte: field i has channels i * bytes, i * bytes + 1, ...

    A shift left drops the higher fields, one right extends the sign.
    """
    codes = lax.bitcast_convert_type(codes, jnp.int8)
    return [(codes << (8 - low - bits)) >> (8 - bits) for low in range(0, 8, bits)]


@functools.lru_cache
def _rotation(dim: int) -> np.ndarray:
    """A random orthogonal matrix, the same for all: QR of normal numbers, signs made unique (F.
    Mezzadri, How to generate random matrices from the classical compact groups, 2007).
    """
    q, r = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


def rotation_digest(dim: int) -> str:
    """Names the matrix that `rotate` multiplies with: another numpy may draw another one."""
    return hashlib.blake2b(_rotation(dim).tobytes(), digest_size=8).hexdigest()


def rotate(x: Float[Array, "K N D"]) -> Float[Array, "K N D"]:
    """The vectors in the basis that codes are made in; lengths and products are as before."""
    return jnp.einsum("knd,de->kne", x, _rotation(x.shape[-1]), precision=lax.Precision.HIGHEST)


def norm_bound(bits: int, dim: int) -> float:
    """|u| is at most this many times the stored scale s.

    With levels |u| * w / sqrt(D) apart, |g_i| <= 2 |u_i| sqrt(D) / (|u| w) + 1, so <g, u> is at
    most |u| sqrt(D) (2 / w + 1), which |u|^2 / s equals. A thousandth more: s is rounded.
    """
    return 1.001 * math.sqrt(dim) * (2 / STEPS[bits] + 1)


@dataclasses.dataclass(frozen=True)
class RoundedQuery:
    """Queries as a scan multiplies them with codes, and what that may err by.

    Attributes:
      integers: int8 [K, N, D], the rotated queries over `step`, rounded.
      step: float32 [K, N], such that what rounding adds is at right angles to the query.
      of_spread, of_scale: float32 [K, N]: the error of an estimate is, with the probability asked
        for, at most `of_spread` times the key's spread plus `of_scale` times its scale.
    """

    integers: Int8[Array, "K N D"]
    step: Float[Array, "K N"]
    of_spread: Float[Array, "K N"]
    of_scale: Float[Array, "K N"]


def round_query(q: Float[Array, "K N D"], bits: int, miss: float) -> RoundedQuery:
    """Rounds queries for keys of some bits; `miss`: see `SketchLayer.scan`."""
    dim = q.shape[-1]
    turned = rotate(q.astype(jnp.float32))
    step = jnp.max(jnp.abs(turned), axis=-1, keepdims=True) / 127
    whole = jnp.round(turned / jnp.where(step > 0, step, 1.0))
    inner = jnp.sum(whole * turned, axis=-1)
    norm = length(turned)
    step = norm * (norm / jnp.where(inner > 0, inner, 1.0))
    lost = length(step[..., None] * whole - turned)
    sure = deviations(miss / 2, dim)
    of_spread = sure * norm + math.sqrt(dim - 1) * lost
    of_scale = sure * norm_bound(bits, dim) / math.sqrt(dim - 1) * lost
    return RoundedQuery(
        whole.astype(jnp.int8),
        step,
        *(jnp.where(norm > 0, x, 0.0) for x in (of_spread, of_scale)),
    )


@functools.lru_cache
def deviations(probability: float, dim: int) -> float:
    """x such that a coordinate of a random point on the unit sphere of D - 1 dimensions exceeds
    x / sqrt(D - 1) with this probability: of density in proportion to (1 - t^2)^((D - 4) / 2).
    """
    t = np.sin(np.linspace(-np.pi / 2, np.pi / 2, 200_001))
    # In the angle, the density gains a factor sqrt(1 - t^2).
    density = np.sqrt(1 - t * t) ** (dim - 3)
    above = np.cumsum(density[::-1])[::-1] / density.sum()
    return float(t[np.argmax(above <= probability)] * math.sqrt(dim - 1))
