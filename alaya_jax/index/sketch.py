"""Keys at a few bits a channel, whose scan estimates every score and says how far it may err.

A page's keys are centred on their mean, rotated by a random orthogonal matrix R and rounded to
2**bits levels, in the manner of RaBitQ (arXiv 2405.12497; several bits: 2409.09913). In place of D
numbers a key has D * bits / 8 bytes of codes and two float16: its scale and its spread. The page's
mean is kept at 8 bits a channel, D / Z bytes a key.

The estimate. Let k = c + r, c the page's centre *as stored*, u = R r. The codes are odd integers
g, near u in direction; s = |u|^2 / <g, u>. Then s g = u + e with e at right angles to u, and

    q.k = q.c + <u, R q>  ~  q.c + s <g, R q>,   which errs by <e, R q>.

The error term. R is drawn without regard to k and q. Given u, hence e, the part of R q at right
angles to u has length at most |q|, and every direction in those D - 1 dimensions is equally likely;
so the error is at most |e| |q| X with X a coordinate of a random point on the unit sphere there,
whose tail P(X > x) is known exactly and is below exp(-(D-1) x^2 / 2). The spread
|e| / sqrt(D - 1) is the standard deviation of the error for |q| = 1.

The query is rounded too, to int8, so that a scan multiplies integers: d q' = R q + n, with d chosen
such that n is at right angles to R q. By the same argument, with u and q changing places, it adds
at most |u| |n| X, and <e, n> is at most |e| |n|. |u| is not stored; s bounds it: see `norm_bound`.

So, with `deviations(miss / 2, D)` times these standard deviations for an error, a given estimate is
too low by more than its error with probability at most `miss`, over the choice of R; too high
likewise. What float16 loses of the scale is added to the spread.

The centre. One offset common to all keys would change no difference of scores, and the estimate
holds for any c; but |e| is in proportion to |k - c|. Keys of neighbouring tokens are alike: on
SmolLM2-135M the spread is about a third less with page means than with the mean of the context
(benchmarks/sketch_recall.py), for half the bytes, at Z = 16, of another bit a channel. And a page's
own centre never goes stale, whoever shares the page and whatever is appended behind it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float16, Int, Int8, UInt8

from alaya_jax import cache
from alaya_jax.attention.paged import KeyRange, Pages, over_tiles, read_on_cpu
from alaya_jax.cache import NO_PAGE, PageTable
from alaya_jax.errors import ConfigError
from alaya_jax.index.codes import (
    STEPS,
    deviations,
    norm_bound,
    quantize,
    rotate,
    to_half,
    to_half_above,
    unpack,
)
from alaya_jax.index.exact import operand_dtype, rescore, score_at
from alaya_jax.models.config import LlamaConfig
from alaya_jax.sharding import ShardingRules

MISS = 1e-4
"""Probability that a key which DIPR wants is not rescored, at most."""

_BLOCK = 128  # pages sketched at once: bounds the float32 copies
_EPSILON = 2.0**-20  # of |k|: what float32 sums may differ by


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SketchLayer:
    """The sketch of one layer's keys.

    Attributes:
      codes: uint8 [K, P, Z, D * bits / 8]. Byte m holds channels m, m + D * bits / 8, ... of the
        rotated residual, lowest bits first, each as a two's complement integer c: level 2 c + 1.
      scale: float16 [K, P, Z], s above.
      spread: float16 [K, P, Z], standard deviation of the error for |q| = 1.
      centre: int8 [K, P, D], of a page, not rotated; times `centre_scale` float16 [K, P].
    """

    codes: UInt8[Array, "K P Z D*bits/8"]
    scale: Float16[Array, "K P Z"]
    spread: Float16[Array, "K P Z"]
    centre: Int8[Array, "K P D"]
    centre_scale: Float16[Array, "K P"]

    @property
    def bits(self) -> int:
        """Bits a channel."""
        return 8 * self.codes.shape[-1] // self.centre.shape[-1]

    def extend(
        self,
        k_pages: Float[Array, "K P Z D"],
        table: PageTable,
        count: Int[Array, " B"],
        new_tokens: int,
    ) -> "SketchLayer":
        """Sketches the pages that an append wrote to.

        A page that is not full is sketched as far as it is filled, and again when it is extended:
        so all keys are covered at any time, and the result does not depend on how they came.

        Args:
          k_pages: the layer's keys, the new ones written.
          table: pages, and lengths *before* the new tokens, as `cache.append` takes them.
          count: new tokens of each sequence.
          new_tokens: at most this many are new; static.
        """
        size = k_pages.shape[2]
        touched = 1 if new_tokens == 1 else -(-new_tokens // size) + 1
        index = table.length[:, None] // size + jnp.arange(touched)  # [B, touched]
        page = jnp.take_along_axis(table.pages, index, axis=1, mode="clip")
        filled = (table.length + count)[:, None] - index * size
        fresh = (filled > 0) & (count > 0)[:, None]
        return self.build(k_pages, jnp.where(fresh, page, NO_PAGE).ravel(), filled.ravel())

    def build(
        self, k_pages: Float[Array, "K P Z D"], ids: Int[Array, " N"], filled: Int[Array, " N"]
    ) -> "SketchLayer":
        """Sketches the first `filled[i]` tokens of pages `ids[i]`; what was there before is gone.

        `NO_PAGE` may be among them any number of times; other pages once.
        """

        def write(layer: "SketchLayer", ids: Array, filled: Array) -> "SketchLayer":
            new = _sketch(k_pages[:, ids], filled, self.bits)
            return jax.tree.map(lambda pool, pages: cache.write_pages(pool, ids, pages), layer, new)

        if ids.shape[0] <= _BLOCK:
            return write(self, ids, filled)
        pad = (0, -ids.shape[0] % _BLOCK)
        ids = jnp.pad(ids, pad, constant_values=NO_PAGE).reshape(-1, _BLOCK)
        filled = jnp.pad(filled, pad).reshape(-1, _BLOCK)
        return lax.fori_loop(
            0, ids.shape[0], lambda i, layer: write(layer, ids[i], filled[i]), self
        )

    def scan(
        self,
        q: Float[Array, "K G T D"],
        pages: Pages,
        keys: KeyRange,
        miss: float = MISS,
    ) -> tuple[Float[Array, "K G T S"], Float[Array, "K G T S"]]:
        """Estimates the raw scores of all keys in range, without reading a key.

        Args:
          q: rotated (RoPE), unscaled queries.
          pages: which pages; its keys and values are not read.
          keys: positions that each query may see.
          miss: probability that a score lies above `estimate + error`, at most; and that it lies
            below `estimate - error`. Static.

        Returns:
          estimate (-inf out of range) and error (0 there), S as in `score_range`.
        """
        q = q.astype(jnp.float32)
        heads, group, t, dim = q.shape
        size = self.codes.shape[2]
        rows = q.reshape(heads, group * t, dim)
        turned = rotate(rows)
        step = jnp.max(jnp.abs(turned), axis=-1, keepdims=True) / 127
        whole = jnp.round(turned / jnp.where(step > 0, step, 1.0))
        square = jnp.sum(turned * turned, axis=-1, keepdims=True)
        inner = jnp.sum(whole * turned, axis=-1, keepdims=True)
        step = square / jnp.where(inner > 0, inner, 1.0)  # [K, GT, 1]
        norm = jnp.sqrt(square)
        lost = jnp.sqrt(jnp.sum((step * whole - turned) ** 2, axis=-1, keepdims=True))
        integers = whole.astype(jnp.int8)
        total = jnp.sum(whole, axis=-1, keepdims=True)
        # Of the error: times a key's spread, and times its scale.
        sure = deviations(miss / 2, dim)
        of_spread = sure * norm + math.sqrt(dim - 1) * lost
        of_scale = sure * norm_bound(self.bits, dim) / math.sqrt(dim - 1) * lost

        def visit(tile: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            read = functools.partial(_read, ids=_tile_ids(pages, tile))
            codes = unpack(read(self.codes), self.bits)
            codes = codes.reshape(heads, -1, dim)
            levels = jnp.einsum(
                "krd,ksd->krs", integers, codes, preferred_element_type=jnp.int32
            ).astype(jnp.float32)
            scale, spread = (
                read(pool).astype(jnp.float32).reshape(heads, 1, -1)
                for pool in (self.scale, self.spread)
            )
            centre = jnp.einsum(
                "krd,kpd->krp",
                rows,
                read(self.centre).astype(jnp.float32),
                precision=lax.Precision.HIGHEST,
            ) * read(self.centre_scale).astype(jnp.float32).reshape(heads, 1, -1)
            tile_estimate = scale * (step * (2 * levels + total)) + jnp.repeat(centre, size, -1)
            # A key too large for float16 has an infinite spread; a query of zeros errs by nothing.
            tile_error = jnp.where(norm > 0, of_spread * spread + of_scale * scale, 0.0)
            position = pages.positions(tile)
            seen = keys.mask(position)
            new = (
                jnp.where(seen, _split(tile_estimate, group, t), -jnp.inf),
                jnp.where(seen, _split(tile_error, group, t), 0.0),
            )
            return jax.tree.map(
                lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, position[0], -1),
                carry,
                new,
            )

        shape = (heads, group, t, pages.num_tiles * pages.tile_tokens)
        return over_tiles(pages, keys, visit, (jnp.full(shape, -jnp.inf), jnp.zeros(shape)))

    def range_scores(
        self,
        q: Float[Array, "K G T D"],
        pages: Pages,
        keys: KeyRange,
        beta: float | jax.Array,
        seed: Float[Array, "K G T"],
        miss: float = MISS,
    ) -> Float[Array, "K G T S"]:
        """Exact raw scores of the keys that may be in DIPR's answer, -inf elsewhere.

        `query.select` then answers `DIPR(beta)` as from the scores of all keys: each key of the
        answer is there with probability at least 1 - miss, and no other key is, unless the best
        key is the one that was missed.

        Args:
          q, pages, keys, miss: as in `scan`.
          beta: the range, a number or [H].
          seed: best raw score of the window, or -inf.
        """
        q = q.astype(operand_dtype(pages))
        estimate, error = self.scan(q, pages, keys, miss)
        best = jnp.maximum(seed, pivot(q, pages, estimate))
        return rescore(q, pages, candidates(estimate, error, beta, best))


def pivot(
    q: Float[Array, "K G T D"], pages: Pages, estimate: Float[Array, "K G T S"]
) -> Float[Array, "K G T"]:
    """The exact raw score of the key of best estimate; -inf where no key is in range.

    One key read for each query, and a best score that is surely attained. It stands in for
    `max(estimate - error)`, which is lower, and above the true maximum if any bound fails.
    """
    top = jnp.max(estimate, axis=-1)
    # The first of the largest. XLA vectorises this on CPU, and argmax not.
    position = jnp.arange(estimate.shape[-1])
    first = jnp.min(
        jnp.where(estimate == top[..., None], position, estimate.shape[-1] - 1), axis=-1
    )
    return jnp.where(top > -jnp.inf, score_at(q, pages, first), -jnp.inf)


def candidates(
    estimate: Float[Array, "K G T S"],
    error: Float[Array, "K G T S"],
    beta: float | jax.Array,
    best: Float[Array, "K G T"],
) -> jax.Array:
    """bool [K, G, T, S]: keys that may score at least `best - beta`.

    Args:
      estimate, error: of a scan.
      beta: a number, [H], or [K, G, T].
      best: a score that some visible key attains (`pivot`, the window's best): then no more is
        asked of a key than DIPR asks, and a key of DIPR's answer is missed only if its own bound
        fails.
    """
    beta = jnp.asarray(beta, jnp.float32)
    if beta.ndim == 1:
        beta = beta.reshape(*estimate.shape[:2], 1)
    return (estimate + error >= (best - beta)[..., None]) & (estimate > -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sketch:
    """The sketch of every layer's keys.

    Attributes:
      layers: L sketches.
    """

    layers: tuple[SketchLayer, ...]

    @classmethod
    def create(
        cls,
        config: LlamaConfig,
        num_pages: int,
        page_size: int,
        bits: int = 4,
        mesh: jax.sharding.Mesh | None = None,
        rules: ShardingRules | None = None,
    ) -> "Sketch":
        """The sketch of an empty cache; kv heads sharded like `PagedKV.create`'s.

        Raises:
          ConfigError: `bits` is not 2, 4 or 8, or the codes of a key do not fill whole bytes.
        """
        heads, dim = config.num_key_value_heads, config.head_dim
        if bits not in STEPS:
            raise ConfigError(f"Sketch(bits={bits}): use one of {sorted(STEPS)}")
        if dim * bits % 8 or dim < 4:
            raise ConfigError(
                f"Sketch(bits={bits}): {dim} channels (head_dim) do not fill whole bytes; use 8"
            )

        def zeros(dtype: jax.typing.DTypeLike, *shape: int) -> Array:
            shape = (heads, num_pages, *shape)
            axes = ("kv_heads", *(None,) * (len(shape) - 1))
            place = (rules or ShardingRules()).sharding(mesh, axes, shape) if mesh else None
            return jnp.zeros(shape, dtype, device=place)

        return cls(
            tuple(
                SketchLayer(
                    codes=zeros(jnp.uint8, page_size, dim * bits // 8),
                    scale=zeros(jnp.float16, page_size),
                    spread=zeros(jnp.float16, page_size),
                    centre=zeros(jnp.int8, dim),
                    centre_scale=zeros(jnp.float16),
                )
                for _ in range(config.num_hidden_layers)
            )
        )

    def replace_layer(self, layer: int, new: SketchLayer) -> "Sketch":
        """The same index with another sketch of one layer."""
        return Sketch((*self.layers[:layer], new, *self.layers[layer + 1 :]))

    def __repr__(self) -> str:
        first = self.layers[0]
        if not isinstance(first.codes, jax.Array | jax.ShapeDtypeStruct):
            return "Sketch(...)"  # a tree of something else, while jax transforms it
        heads, pages, size, _ = first.codes.shape
        page = sum(x.dtype.itemsize * math.prod(x.shape[2:]) for x in jax.tree.leaves(first))
        return (
            f"Sketch({len(self.layers)} layers, {pages} pages of {size} tokens, {heads} kv heads, "
            f"{first.bits} bits a channel, {page / size:.1f} bytes a key)"
        )


def _sketch(k: Float[Array, "K N Z D"], filled: Int[Array, " N"], bits: int) -> SketchLayer:
    """The sketch of N pages."""
    size = k.shape[2]
    valid = (jnp.arange(size) < filled[:, None])[None, :, :, None]
    k = jnp.where(valid, k.astype(jnp.float32), 0.0)  # a page holds whatever was there before
    mean = jnp.sum(k, axis=2) / jnp.maximum(jnp.minimum(filled, size), 1)[None, :, None]
    unit = to_half(jnp.max(jnp.abs(mean), axis=-1) / 127)
    step = unit.astype(jnp.float32)[..., None]
    centre = jnp.clip(jnp.round(mean / jnp.where(step > 0, step, 1.0)), -127, 127)
    residual = jnp.where(valid, k - (centre * step)[:, :, None], 0.0)

    codes, scale, spread = quantize(residual, bits)
    spread = to_half_above(spread + _EPSILON * jnp.sqrt(jnp.sum(k * k, axis=-1)))
    return SketchLayer(
        codes, scale, jnp.where(valid[..., 0], spread, 0), centre.astype(jnp.int8), unit
    )


def _tile_ids(pages: Pages, tile: Array) -> Int[Array, " n"]:
    first = pages.positions(tile)[0] // pages.k.shape[2]
    return lax.dynamic_slice_in_dim(pages.ids, first, pages.tile_pages)


def _read(pool: Array, ids: Int[Array, " n"]) -> Array:
    """Pages `ids` of a pool [K, P, ...]."""
    if jax.default_backend() != "cpu":
        return pool[:, ids]
    flat = pool.reshape(*pool.shape[:2], 1, -1)
    return read_on_cpu(flat, ids).reshape(pool.shape[0], -1, *pool.shape[2:])


def _split(x: Float[Array, "K GT S"], group: int, t: int) -> Float[Array, "K G T S"]:
    return x.reshape(x.shape[0], group, t, -1)
