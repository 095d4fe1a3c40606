"""Keys at a few bits a channel, whose scan estimates every score and says how far it may err.

A page's keys are centred on their mean, rotated by a random orthogonal matrix R and rounded to
2**bits levels, in the manner of RaBitQ (arXiv 2405.12497; several bits: 2409.09913). In place of D
numbers a key has D * bits / 8 bytes of codes and two float16: its scale and its spread. The page's
mean is kept at 8 bits a channel, D / Z bytes a key; so is the mean of its values, with two
float16 that say how far they lie from it (`output_error.py`).

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
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float16, Int, Int8, UInt8, UInt32

from alaya_jax import cache
from alaya_jax.cache import NO_PAGE, page_zeros
from alaya_jax.cache.views import FEW_ROWS, KeyRange, Pages, over_tiles, read_pages
from alaya_jax.errors import ConfigError
from alaya_jax.index.basis import BITS, Basis
from alaya_jax.index.codes import (
    STEPS,
    RoundedQuery,
    deviations,
    fields,
    length,
    quantize,
    rotation_digest,
    round_query,
    to_half,
    to_half_above,
)
from alaya_jax.index.output_error import spread_of
from alaya_jax.index.recovery import Weights, heads_axis
from alaya_jax.index.scan import FAR, Scan
from alaya_jax.models.config import LlamaConfig
from alaya_jax.sharding import ShardingRules

MISS = 1e-4
"""Probability that a score is above its estimate plus error, at most; below likewise."""

SCAN_TOKENS = 4096
"""Keys scanned at once, for few queries: enough that starting an operation costs little."""

VERSION = 2
"""Of how sketches are made, to be raised when they come out otherwise."""

_BLOCK = 128  # pages sketched at once: bounds the float32 copies
_EPSILON = 2.0**-20  # of |k|: what float32 sums may differ by


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SketchLayer:
    """The sketch of one layer's keys.

    Attributes:
      codes: of a random rotation uint8 [K, P, Z, D * bits / 8]: byte m holds channels m, m + D *
        bits / 8, ... of the rotated residual, lowest bits first, each as a two's complement integer
        c: level 2 c + 1. Of a learnt basis uint32 [K, P, D * bits / 32, Z], see there.
      scale: float16 [K, P, Z], s above.
      spread: float16 [K, P, Z], standard deviation of the error for |q| = 1.
      centre: of a page, not rotated: int8 [K, P, D], times `centre_scale` float16 [K, P]; with a
        basis uint8 [K, P, D / 2], see there.
      value, value_scale: int8 [K, P, D] and float16 [K, P], the mean of the page's values.
      value_spread: float16 [K, P, 2], how far they lie from it; see `output_error.spread_of`.
      basis: learnt, where pages are looked at; None: a random rotation, or not looked at.
    """

    codes: UInt8[Array, "K P Z D*bits/8"] | UInt32[Array, "K P W Z"]
    scale: Float16[Array, "K P Z"]
    spread: Float16[Array, "K P Z"]
    centre: Int8[Array, "K P D"] | UInt8[Array, "K P D/2"]
    centre_scale: Float16[Array, "K P"]
    value: Int8[Array, "K P D"]
    value_scale: Float16[Array, "K P"]
    value_spread: Float16[Array, "K P 2"]
    basis: Basis | None = None

    @property
    def bits(self) -> float:
        """Bits a channel, on average."""
        size, dim = self.scale.shape[-1], self.value.shape[-1]
        bits = 8 * self.codes.dtype.itemsize * math.prod(self.codes.shape[2:]) / (size * dim)
        return int(bits) if bits.is_integer() else bits

    def seen_by(self, basis: Basis | None) -> "SketchLayer":
        """With the basis that its codes are of; None: kept without."""
        return dataclasses.replace(self, basis=basis)

    def ask(self, q: Float[Array, "K N D"], miss: float) -> RoundedQuery:
        """Queries as a scan takes them; `miss`: see `scan`."""
        if self.basis is None:
            return round_query(q, int(self.bits), miss)
        return self.basis.ask(q, miss)

    def _products(self, codes: Array, integers: Int8[Array, "K R F"]) -> Float[Array, "K R S"]:
        """Of queries' integers and the levels of some pages' keys."""
        heads, rows, _ = integers.shape
        if self.basis is not None:
            return self.basis.products(codes, integers).reshape(heads, rows, -1)
        # Field by field: put together, the codes would be written once more.
        of_key = fields(codes.reshape(heads, -1, codes.shape[3]), int(self.bits))
        levels = sum(
            jnp.einsum("ksd,krd->ksr", field, part, preferred_element_type=jnp.int32)
            for field, part in zip(of_key, jnp.split(integers, len(of_key), -1), strict=True)
        )
        total = jnp.sum(integers, axis=-1, keepdims=True, dtype=jnp.int32)
        return 2 * jnp.swapaxes(levels, 1, 2).astype(jnp.float32) + total

    def build(
        self,
        k_pages: Float[Array, "K P Z D"],
        v_pages: Float[Array, "K P Z D"],
        ids: Int[Array, " N"],
        filled: Int[Array, " N"],
    ) -> "SketchLayer":
        """Sketches the first `filled[i]` tokens of pages `ids[i]`; what was there before is gone.

        `NO_PAGE` may be among them any number of times; other pages once.

        Args:
          k_pages, v_pages: the layer's pool.
          ids: pages.
          filled: tokens that each holds.
        """

        def write(layer: "SketchLayer", ids: Array, filled: Array) -> "SketchLayer":
            new = _sketch(k_pages[:, ids], v_pages[:, ids], filled, self)
            return jax.tree.map(lambda pool, pages: cache.write_pages(pool, ids, pages), layer, new)

        pages = self.seen_by(None)
        if ids.shape[0] <= _BLOCK:
            return write(pages, ids, filled).seen_by(self.basis)
        pad = (0, -ids.shape[0] % _BLOCK)
        ids = jnp.pad(ids, pad, constant_values=NO_PAGE).reshape(-1, _BLOCK)
        filled = jnp.pad(filled, pad).reshape(-1, _BLOCK)
        built = lax.fori_loop(
            0, ids.shape[0], lambda i, layer: write(layer, ids[i], filled[i]), pages
        )
        return built.seen_by(self.basis)

    def scan(
        self,
        q: Float[Array, "K G T D"],
        pages: Pages,
        keys: KeyRange,
        miss: float = MISS,
    ) -> Scan:
        """Estimates the raw scores of all keys in range, without reading a key.

        Args:
          q: rotated (RoPE), unscaled queries.
          pages: which pages; its keys and values are not read.
          keys: positions that each query may see.
          miss: probability that a score lies above `estimate + error`, at most; and that it lies
            below `estimate - error`. Static.
        """
        q = q.astype(jnp.float32)
        heads, group, t, dim = q.shape
        size = self.scale.shape[2]
        rows = q.reshape(heads, group * t, dim)
        asked = self.ask(rows, miss)
        step = asked.step[..., None]
        of_centre, offset = self.ask_centre(rows)

        if group * t <= FEW_ROWS:
            pages = pages.in_tiles(SCAN_TOKENS)

        def visit(read_page: Any, tile: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            read = functools.partial(read_page, tile=tile)
            levels = self._products(read(self.codes), asked.integers)
            scale, spread = (read(x).reshape(heads, -1) for x in (self.scale, self.spread))
            centre = (
                jnp.einsum(
                    "krd,kpd->krp",
                    of_centre,
                    self._whole_centre(read(self.centre)).astype(jnp.float32),
                    precision=lax.Precision.HIGHEST,
                )
                * read(self.centre_scale).astype(jnp.float32)[:, None]
                + offset
            )
            estimate = scale.astype(jnp.float32)[:, None] * (step * levels)
            estimate = estimate.reshape(*centre.shape, size) + centre[..., None]
            seen = keys.mask(pages.positions(tile))
            new = (
                jnp.where(seen, estimate.reshape(heads, group, t, -1), -jnp.inf),
                *(jnp.where(seen.any(0), term, 0) for term in (spread, scale)),
            )
            at = pages.first_column(tile)
            return tuple(
                lax.dynamic_update_slice_in_dim(whole, part, at, -1)
                for whole, part in zip(carry, new, strict=True)
            )

        def fold(read_page: Any) -> tuple[Array, ...]:
            # Made here, by the branch that is taken. float16 is what the pools hold.
            start = (
                jnp.full((heads, group, t, pages.columns), -jnp.inf),
                *(jnp.zeros((heads, pages.columns), jnp.float16) for _ in range(2)),
            )
            return over_tiles(pages, keys, functools.partial(visit, read_page), start)

        def by_page() -> tuple[Array, ...]:
            return fold(lambda pool, tile: read_pages(pool, pages.tile_ids(tile)))

        if pages.tile_pages > self.codes.shape[1]:  # the table is wider than the pool
            estimate, spread, scale = by_page()
        else:
            # Sliced where they are used, codes are not copied: worth a second version of the loop.
            run = pages.is_run(pages.before(jnp.max(keys.high)))
            estimate, spread, scale = lax.cond(run, lambda: fold(pages.read_run), by_page)
        of_row = tuple(x.reshape(heads, group, t) for x in (asked.of_spread, asked.of_scale))
        # Infinite for a key too large for float16; yet a query of zeros errs by nothing.
        spread = jnp.minimum(spread.astype(jnp.float32), FAR)
        of_key = spread, scale.astype(jnp.float32)
        return Scan(estimate, of_row, of_key, deviations(miss / 2, dim))

    def ask_centre(
        self, rows: Float[Array, "K R D"]
    ) -> tuple[Float[Array, "K R D"], Float[Array, "K R 1"] | float]:
        """Queries for the integers of centres, exact where these are bfloat16's, and what every
        key's score has beside these.
        """
        if self.basis is None:
            return rows, 0.0
        offset = jnp.einsum("krd,kd->kr", rows, self.basis.offset, precision=lax.Precision.HIGHEST)
        return rows * self.basis.grain[:, None], offset[..., None]

    def _whole_centre(self, centre: Array) -> Int8[Array, "K N D"]:
        if self.basis is None:
            return centre
        return jnp.concatenate(fields(centre, 4), axis=-1)

    def value_spreads(self, pages: Pages, keys: KeyRange) -> Float[Array, "K N 2"]:
        """How far the values of each page lie from their mean; 0 for pages out of range."""

        def visit(tile: Array, spreads: Array) -> Array:
            new = read_pages(self.value_spread, pages.tile_ids(tile)).astype(jnp.float32)
            seen = keys.mask(pages.positions(tile)).any(0).reshape(-1, pages.size).any(-1)
            new = jnp.where(seen[:, None], jnp.minimum(new, FAR), 0.0)
            return lax.dynamic_update_slice_in_dim(spreads, new, pages.first_page(tile), 1)

        start = jnp.zeros((self.codes.shape[0], pages.ids.shape[0], 2))
        return over_tiles(pages, keys, visit, start)

    def attend_means(
        self,
        q: Float[Array, "K G T D"],
        pages: Pages,
        weights: Weights,
        read: Bool[Array, "K G T S"],
    ) -> tuple[Float[Array, "K G T D"], Float[Array, "K G T"]]:
        """Attention over keys of these weights, each with its page's mean value.

        Args:
          q: only its shape matters.
          pages: which pages; its keys and values are not read.
          weights: by column.
          read: keys that are left out.

        Returns:
          the mean of the values, and the log-sum-exp of the scaled scores, -inf where none is left.
        """
        heads, group, t, dim = q.shape

        def sums(head: tuple[Array, Array]) -> Float[Array, "R N"]:
            weight, read = head
            unread = jnp.where(read, 0.0, weight).reshape(-1, weight.shape[-1])
            return jnp.sum(unread.reshape(len(unread), -1, pages.size), axis=-1)

        # By heads: XLA's CPU backend writes out what it adds up.
        axis = heads_axis(read)
        of_heads = tuple(jnp.moveaxis(x, axis, 0) for x in (weights.weight, read))
        by_page = lax.map(sums, of_heads).reshape(heads, group * t, -1)

        def visit(tile: Array, acc: Array) -> Array:
            first, ids = pages.first_page(tile), pages.tile_ids(tile)
            w = lax.dynamic_slice_in_dim(by_page, first, pages.tile_pages, -1)
            fresh = pages.fresh(tile).reshape(-1, pages.size)[:, 0]
            # Beside the pages that are seen, files may hold anything.
            scale = read_pages(self.value_scale, ids).astype(jnp.float32).reshape(heads, 1, -1)
            w = jnp.where(fresh & (w > 0), w * scale, 0.0)
            value = read_pages(self.value, ids).astype(jnp.float32)
            return acc + jnp.einsum("krn,knd->krd", w, value)

        some = jnp.any(by_page > 0, axis=(0, 1))
        end = jnp.max(jnp.where(some, pages.starts() + pages.size, 0))
        keys = KeyRange(jnp.zeros(1, jnp.int32), end[None])
        acc = over_tiles(pages, keys, visit, jnp.zeros((heads, group * t, dim)))
        total = jnp.sum(by_page, axis=-1).reshape(heads, group, t)
        safe = jnp.where(total > 0, total, 1.0)
        lse = jnp.where(total > 0, dim**-0.5 * weights.best + jnp.log(safe), -jnp.inf)
        return acc.reshape(q.shape) / safe[..., None], lse


@dataclasses.dataclass(frozen=True, repr=False)
class Sketch:
    """The index of keys at a few bits a channel.

    Attributes:
      bits: a channel, on average. 1, 2, 4 or 8 of a random rotation; 0.5, 1, 1.5, 2 or 4 of a
        learnt basis, whose channels have 0 to 8 bits each.
      basis: "random": the same rotation for all models, whose bound is proven. "learnt": the
        model's own (`aj.calibrate`), which does with one bit what a random one does with two to
        four; where a model has none, plans say "random" instead, and so does `explain`.
    """

    bits: float = 4
    basis: Literal["random", "learnt"] = "random"

    def __post_init__(self):
        allowed = {"random": tuple(STEPS), "learnt": BITS}
        if self.basis not in allowed:
            raise ConfigError(
                f"Sketch(basis={self.basis!r}): use one of {sorted(allowed, reverse=True)}"
            )
        if isinstance(self.bits, bool) or self.bits not in allowed[self.basis]:
            raise ConfigError(f"{self!r}: use one of {sorted(allowed[self.basis])}")
        # 2.0 is 2, in names and files too.
        object.__setattr__(self, "bits", next(x for x in allowed[self.basis] if x == self.bits))

    def __repr__(self) -> str:
        basis = "" if self.basis == "random" else f", basis={self.basis!r}"
        return f"Sketch(bits={self.bits!r}{basis})"

    def random(self) -> "Sketch":
        """The one of as many bits, or half a bit more, that any model has."""
        return Sketch(math.ceil(self.bits))

    @property
    def _word(self) -> int:
        return 32 if self.basis == "learnt" else 8

    def fits(self, config: LlamaConfig) -> bool:
        """Whether a key's codes fill whole words."""
        return config.head_dim >= 4 and config.head_dim * self.bits % self._word == 0

    def create(
        self,
        config: LlamaConfig,
        num_pages: int,
        page_size: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
        rules: ShardingRules | None = None,
    ) -> SketchLayer:
        """The sketch of one layer's empty cache; sharded like `PagedKV.create`'s arrays.

        Raises:
          ConfigError: the codes of a key do not fill whole bytes.
        """
        del dtype
        dim, word, learnt = config.head_dim, self._word, self.basis == "learnt"
        if not self.fits(config):
            raise ConfigError(
                f"{self!r}: {dim} channels (head_dim) do not fill words of {word} bits; use "
                "Sketch(8)"
            )
        zeros = functools.partial(page_zeros, config, num_pages, mesh, rules)
        words = int(dim * self.bits) // word
        return SketchLayer(
            codes=zeros((words, page_size), jnp.uint32)
            if learnt
            else zeros((page_size, words), jnp.uint8),
            scale=zeros((page_size,), jnp.float16),
            spread=zeros((page_size,), jnp.float16),
            centre=zeros((dim // 2,), jnp.uint8) if learnt else zeros((dim,), jnp.int8),
            centre_scale=zeros((), jnp.float16),
            value=zeros((dim,), jnp.int8),
            value_scale=zeros((), jnp.float16),
            value_spread=zeros((2,), jnp.float16),
        )

    def formula(self, config: LlamaConfig, basis: str | None = None) -> dict[str, Any]:
        """All that sketches depend on beside the page, as plain data: they are kept in files under
        it, and read by nobody who would make others.

        Args:
          config: of the model.
          basis: digest of what was learnt, for a learnt basis.
        """
        turned = rotation_digest(config.head_dim) if self.basis == "random" else basis
        return {"sketch": VERSION, **dataclasses.asdict(self), "rotation": turned}

    def page_bytes(self, config: LlamaConfig, page_size: int, dtype: jax.typing.DTypeLike) -> int:
        """Bytes of one page, one layer."""
        del dtype
        dim = config.head_dim
        centre = dim // 2 if self.basis == "learnt" else dim
        page = page_size * (int(dim * self.bits) // 8 + 4) + centre + dim + 8
        return config.num_key_value_heads * page


def _sketch(
    k: Float[Array, "K N Z D"],
    v: Float[Array, "K N Z D"],
    filled: Int[Array, " N"],
    like: SketchLayer,
) -> SketchLayer:
    """The sketch of N pages, of the bits and the basis of another."""
    size, basis = k.shape[2], like.basis
    valid = (jnp.arange(size) < filled[:, None])[None, :, :, None]
    # A page holds whatever was there before.
    k, v = (jnp.where(valid, x.astype(jnp.float32), 0.0) for x in (k, v))
    count = jnp.maximum(jnp.minimum(filled, size), 1)[None, :, None]
    mean = jnp.sum(k, axis=2) / count
    value, value_unit = _to_int8(jnp.sum(v, axis=2) / count)
    if basis is None:
        centre, unit = _to_int8(mean)
        middle = centre.astype(jnp.float32) * unit.astype(jnp.float32)[..., None]
    else:
        centre, unit, middle = basis.centre(mean)
    residual = jnp.where(valid, k - middle[:, :, None], 0.0)

    if basis is None:
        codes, scale, spread = quantize(residual, int(like.bits))
        spread = to_half_above(spread + _EPSILON * length(k))
    else:
        codes, scale, spread = basis.quantize(residual)
        spread = to_half_above(spread + _EPSILON * basis.size(k))
    spread = jnp.where(valid[..., 0], spread, 0)
    middle_value = value.astype(jnp.float32) * value_unit.astype(jnp.float32)[..., None]
    apart = spread_of(v, valid, middle_value)
    return SketchLayer(codes, scale, spread, centre, unit, value, value_unit, to_half_above(apart))


def _to_int8(x: Float[Array, "K N D"]) -> tuple[Int8[Array, "K N D"], Float16[Array, "K N"]]:
    """Vectors as integers, and the unit of each."""
    unit = to_half(jnp.max(jnp.abs(x), axis=-1) / 127)
    step = unit.astype(jnp.float32)[..., None]
    whole = jnp.clip(jnp.round(x / jnp.where(step > 0, step, 1.0)), -127, 127)
    return whole.astype(jnp.int8), unit
