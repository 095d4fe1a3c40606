"""Synthetic keys and queries with planted critical sets: what a long context might look like.

Keys and queries of one layer, K kv heads of G query heads, made in blocks from a seed. A kv head
has topics. A topic has a direction u, which topics of one field share in part, and a set of keys at
random positions, whose size is drawn between `SIZES` (evenly in its logarithm). Half of the keys
belong to a topic, the rest to a field alone, and weakly.

A query of the topic is `TAU u` plus noise and an offset of its head; so queries lie elsewhere than
keys, as in attention: their noise is smaller, their offset is their own. A key of the topic is
`x u` plus noise at right angles to u, of a length that spreads. So its score is `TAU x`, up to what
the two noises make, and it is made to lie within `SPREAD` of the set's best: inside the range of
alpha 0.0144 (48 at D = 128). The mean of x is as large as it must be for the set to hold some 0.99
of the attention mass against all other keys of the context, so small sets stand out more.

Every head asks mostly for its own share of the topics, and sometimes for any.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alaya_jax.index.learnt import Learnt, Moments

SIZES = (16, 512)
TAU = 14.0
SPREAD = 24.0  # of planted scores, raw, before the noise of queries
OWN = 0.7  # share of a head's queries that are for its own topics
COMMON = 0.35  # of a direction's square: its field's
FIELD = 16  # topics a field
NOISE = 0.7  # of a key's channel
CLEAR = 3000  # how much a set outweighs the rest, roughly
BLOCK = 8192
LEARN_STREAM = 2000  # of queries that a sketch's basis is learnt from: none of those asked
PAGE = 16


@dataclasses.dataclass(frozen=True)
class Planted:
    """The recipe of one layer of one context.

    Attributes:
      n, kv_heads, group, dim: N, K, G, D.
      seed: equal seeds give equal data.
      directions: float32 [K, M, D], of the M topics.
      fields: float32 [K, M, D], the part of them that a field has in common, of length 1.
      offsets: float32 [K, G, D], of queries; those of keys are `key_offset` [K, D].
      topic: int32 [K, N], each key's topic or the complement of its field's first topic.
      sizes: int32 [K, M], keys of each topic.
    """

    n: int
    kv_heads: int
    group: int
    dim: int
    seed: int
    directions: np.ndarray
    fields: np.ndarray
    offsets: np.ndarray
    key_offset: np.ndarray
    topic: np.ndarray
    sizes: np.ndarray

    @classmethod
    def create(
        cls, n: int, kv_heads: int = 8, group: int = 4, dim: int = 128, seed: int = 0
    ) -> "Planted":
        rng = np.random.default_rng(seed)
        low, high = np.log(SIZES)
        high = min(high, np.log(max(n // 8, 2 * SIZES[0])))
        mean = (np.exp(high) - np.exp(low)) / (high - low)
        topics = max(2, int(n / 2 / mean))

        def unit(*shape: int) -> np.ndarray:
            x = rng.standard_normal((*shape, dim))
            return x / np.linalg.norm(x, axis=-1, keepdims=True)

        fields = np.repeat(unit(kv_heads, -(-topics // FIELD)), FIELD, axis=1)[:, :topics]
        own = unit(kv_heads, topics)
        own -= np.sum(own * fields, -1, keepdims=True) * fields
        own /= np.linalg.norm(own, axis=-1, keepdims=True)
        directions = np.sqrt(COMMON) * fields + np.sqrt(1 - COMMON) * own
        sizes = np.exp(rng.uniform(low, high, (kv_heads, topics))).astype(np.int32)
        topic = ~(rng.integers(0, topics, (kv_heads, n)) // FIELD * FIELD)
        for head in range(kv_heads):
            while sizes[head].sum() > n:
                sizes[head] = np.maximum(sizes[head] // 2, 1)
            places = rng.permutation(n)[: sizes[head].sum()]
            topic[head, places] = np.repeat(np.arange(topics), sizes[head])
        return cls(
            n,
            kv_heads,
            group,
            dim,
            seed,
            directions.astype(np.float32),
            fields.astype(np.float32),
            (6 * unit(kv_heads, group)).astype(np.float32),
            (6 * unit(kv_heads)).astype(np.float32),
            topic.astype(np.int32),
            sizes,
        )

    @property
    def beta(self) -> float:
        """The range of alpha = 0.0144, raw."""
        return float(-np.sqrt(self.dim) * np.log(0.0144))

    def level(self) -> np.ndarray:
        """float32 [K, M]: mean raw score of a topic's keys, see above."""
        scaled = np.log(CLEAR * self.n / self.sizes)
        return (np.sqrt(self.dim) * scaled).astype(np.float32)

    def key_block(self, start: int) -> np.ndarray:
        """float32 [K, BLOCK or what is left, D]: keys from `start`, a multiple of BLOCK."""
        topic = self.topic[:, start : start + BLOCK]
        key = jax.random.fold_in(jax.random.key(self.seed), start)
        return np.asarray(
            _keys(key, topic, self.directions, self.fields, self.key_offset, self.level())
        )

    def keys(self) -> np.ndarray:
        """float32 [K, N, D]."""
        out = np.empty((self.kv_heads, self.n, self.dim), np.float32)
        for start in range(0, self.n, BLOCK):
            block = self.key_block(start)
            out[:, start : start + block.shape[1]] = block
        return out

    def queries(self, count: int, stream: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """float32 [K, G, count, D], and each one's topic [K, G, count].

        `stream` tells apart what must not be the same: queries to build from, and to ask with.
        """
        rng = np.random.default_rng((self.seed, stream))
        topics = self.directions.shape[1]
        shape = (self.kv_heads, self.group, count)
        asked = rng.integers(0, topics, shape)
        mine = asked // self.group * self.group + np.arange(self.group)[None, :, None]
        asked = np.where((rng.random(shape) < OWN) & (mine < topics), mine, asked)
        q = np.empty((*shape, self.dim), np.float32)
        for head in range(self.kv_heads):
            noise = rng.standard_normal((*shape[1:], self.dim), np.float32)
            noise *= 0.3 * TAU / np.sqrt(self.dim)
            q[head] = TAU * self.directions[head][asked[head]] + noise
            q[head] += self.offsets[head][:, None]
        return q, asked

    def moments(self) -> dict[str, np.ndarray]:
        """What a sketch learns from: the first keys, and as many queries of their own stream."""
        keys = self.key_block(0)
        tokens = keys.shape[1] // PAGE * PAGE
        pages = keys[:, :tokens].reshape(self.kv_heads, -1, PAGE, self.dim)
        centres = pages.mean(axis=2)
        rest = (pages - centres[:, :, None]).reshape(self.kv_heads, tokens, self.dim)
        mean = centres.mean(axis=1)
        asked, _ = self.queries(tokens // self.group, LEARN_STREAM)
        return {
            "queries": _second_moment(asked.reshape(self.kv_heads, -1, self.dim)),
            "residuals": _second_moment(rest),
            "centres": _second_moment(centres - mean[:, None]),
            "mean": mean,
        }


def learnt(layers: Sequence[Planted], fingerprint: str) -> Learnt:
    """What sketches of such layers learn; these keys know no positions, so RoPE turns nothing."""
    each = [layer.moments() for layer in layers]
    moments = Moments(**{name: np.stack([m[name] for m in each]) for name in each[0]})
    n, dim = layers[0].n, layers[0].dim
    return Learnt.of([(moments, min(n, BLOCK))], np.zeros(dim // 2), n, fingerprint)


def _second_moment(x: np.ndarray) -> np.ndarray:
    """[K, D, D] of vectors [K, N, D]."""
    return np.einsum("knd,kne->kde", x, x, optimize=True) / x.shape[1]


@functools.partial(jax.jit)
def _keys(key, topic, directions, fields, offset, level):
    planted = topic >= 0
    at = jnp.where(planted, topic, ~topic)[..., None]
    one, two, three = jax.random.split(key, 3)
    u = jnp.take_along_axis(directions, at, 1)
    field = jnp.take_along_axis(fields, at, 1)
    u = jnp.where(planted[..., None], u, field)
    noise = NOISE * jax.random.normal(one, u.shape)
    noise *= jnp.exp(0.25 * jax.random.normal(two, (*topic.shape, 1)))
    noise -= jnp.sum(noise * u, -1, keepdims=True) * u
    where = jax.random.uniform(three, topic.shape)
    mean = jnp.take_along_axis(level, at[..., 0], 1)
    x = jnp.where(planted, mean + SPREAD * (where - 0.5), 0.3 * where * mean) / TAU
    return x[..., None] * u + noise + offset[:, None]
