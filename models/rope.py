"""Rotary position embedding: inverse frequencies of each RoPE type, and the rotation.

The rotation pairs element i with element i + D/2 of a head ("rotate half", HF's order; Meta's and
GGUF's interleaved order is undone when a checkpoint is read). Frequencies are worked out in
float64 on the host and used in float32, angles in float32, as HF does.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alaya_jax.models.config import LlamaConfig, RopeConfig


def inverse_frequencies(config: LlamaConfig, length: int | None = None) -> tuple[np.ndarray, float]:
    """Inverse frequencies and the factor on cos and sin.

    Args:
      config: architecture.
      length: only for dynamic RoPE: the length, in tokens, that the frequencies are stretched for.
        Keys are cached after rotation, so one cache has one length: default `config.max_length`.

    Returns:
      float32 [D/2], radians per token, and the attention factor (yarn; 1.0 otherwise).
    """
    rope, dim = config.rope, config.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    inv_freq, attention_factor = rope.theta**-exponents, 1.0
    if rope.rope_type == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.rope_type == "dynamic":
        original = config.max_position_embeddings
        length = max(length or config.max_length, original)
        stretch = rope.factor * length / original - (rope.factor - 1)
        inv_freq = (rope.theta * stretch ** (dim / (dim - 2))) ** -exponents
    elif rope.rope_type == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    elif rope.rope_type == "yarn":
        inv_freq, attention_factor = _yarn(inv_freq, rope, dim)
    return inv_freq.astype(np.float32), attention_factor


def _llama3(inv_freq: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched, short ones kept, a ramp between them."""
    original = rope.original_max_position_embeddings
    assert original is not None
    turns = original * inv_freq / (2 * math.pi)  # rotations within the original length
    low, high = rope.low_freq_factor, rope.high_freq_factor
    ramp = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inv_freq * ((1 - ramp) / rope.factor + ramp)


def _yarn(inv_freq: np.ndarray, rope: RopeConfig, dim: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): interpolate by dimension, and sharpen attention."""
    original = rope.original_max_position_embeddings
    assert original is not None

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    stretched = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    inv_freq = inv_freq * (stretched / rope.factor + (1 - stretched))

    def magnitude(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inv_freq, magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return inv_freq, magnitude(1.0)


def rotation(
    positions: Int[Array, "B T"], inv_freq: np.ndarray, attention_factor: float
) -> tuple[Float[Array, "B T 1 D/2"], Float[Array, "B T 1 D/2"]]:
    """cos and sin of every position, float32, broadcastable over heads."""
    angles = positions[:, :, None, None].astype(jnp.float32) * inv_freq[None, None, None]
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def rotate(
    x: Float[Array, "B T N D"], cos: Float[Array, "B T 1 D/2"], sin: Float[Array, "B T 1 D/2"]
) -> Float[Array, "B T N D"]:
    """Rotates queries or keys by their positions; computed in `x.dtype`, as HF does."""
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
