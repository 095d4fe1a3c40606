"""Derivatives of attention: a rule for `Full` and `Window`, a refusal for all other queries.

The forward loops visit as many tiles as there are keys, a number that reverse mode would need to
know when tracing. So the derivative, and only the derivative, loops over all tiles of the page
table. It starts from the output and log-sum-exp of the forward pass and recomputes the weights
tile by tile, without storing them (FlashAttention's backward pass, arXiv 2205.14135). The rule is a
forward-mode one (`custom_jvp`), so `jax.jvp`, `jax.grad` and higher derivatives all use it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from alaya_jax.attention.softmax import Partial
from alaya_jax.cache import UNUSED
from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.errors import RequestError

_Answer = tuple[Partial, Float[Array, "K G T"]]


def differentiable(forward: Callable[[Array, Pages, KeyRange], _Answer]) -> Any:
    """Adds the derivative rule to `forward(q, pages, keys)`, attention over a range of keys.

    Output and log-sum-exp are differentiable in the queries and in the pool's keys and values. The
    best score, which only decides what is read, is not.
    """

    def plain(arrays: Any, table: Any, keys: Any, tile: int | None) -> _Answer:
        (q, k, v), (ids, start) = arrays, table
        return forward(q, Pages(k, v, ids, start, tile), KeyRange(*keys))

    of_arrays: Any = jax.custom_jvp(plain, nondiff_argnums=(3,))

    def rule(tile: int | None, primals: Any, tangents: Any) -> tuple[_Answer, _Answer]:
        (q, k, v), (ids, start), keys = primals
        partial, best = of_arrays(*primals, tile)
        moved = [None if isinstance(t, SymbolicZero) else t for t in tangents[0]]
        pages = Pages(k, v, ids, start, tile)
        return (partial, best), (
            _tangent(q, pages, KeyRange(*keys), partial, *moved),
            jnp.zeros_like(best),
        )

    of_arrays.defjvp(rule, symbolic_zeros=True)

    @functools.wraps(forward)
    def attend(q: Array, pages: Pages, keys: KeyRange) -> _Answer:
        fields = dataclasses.fields(keys)
        ranges = tuple(getattr(keys, field.name) for field in fields)
        table = (pages.ids, pages.start)
        partial, best = of_arrays((q, pages.k, pages.v), table, ranges, pages.tile)
        return partial, lax.stop_gradient(best)

    return attend


def _tangent(
    q: Float[Array, "K G T D"],
    pages: Pages,
    keys: KeyRange,
    found: Partial,
    dq: Float[Array, "K G T D"] | None,
    dk: Float[Array, "K P Z D"] | None,
    dv: Float[Array, "K P Z D"] | None,
) -> Partial:
    """The attention's tangent in float32, from those of queries, keys and values (None: zero)."""
    scale = q.shape[-1] ** -0.5
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    lse = jnp.where(jnp.isneginf(found.lse), 0.0, found.lse)
    pools = {"k": pages.k, "v": pages.v, "dk": dk, "dv": dv}
    tiles = {name: _tiles(pages, pool) for name, pool in pools.items() if pool is not None}

    def some(at: Array, tile: dict[str, Array]) -> tuple[Array, Array]:
        seen = keys.mask(at)
        # Slots that no row sees may hold anything, and 0 * NaN must not reach a sum.
        x = {
            name: jnp.where(seen.any(0)[:, None], pool.astype(jnp.float32), 0)
            for name, pool in tile.items()
        }
        scores = scale * product("kgtd,ksd->kgts", q.astype(jnp.float32), x["k"])
        p = jnp.where(seen, jnp.exp(jnp.where(seen, scores, 0) - lse[..., None]), 0)
        moved = jnp.zeros_like(scores)
        if dq is not None:
            moved += product("kgtd,ksd->kgts", dq.astype(jnp.float32), x["k"])
        if dk is not None:
            moved += product("kgtd,ksd->kgts", q.astype(jnp.float32), x["dk"])
        moved = p * scale * moved
        out = product("kgts,ksd->kgtd", moved, x["v"])
        if dv is not None:
            out += product("kgts,ksd->kgtd", p, x["dv"])
        return out, jnp.sum(moved, axis=-1)

    def none(at: Array, tile: dict[str, Array]) -> tuple[Array, Array]:
        del at, tile
        return jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:-1], jnp.float32)

    @jax.checkpoint  # stores only its inputs and recomputes the weights
    def visit(at: Array, tile: dict[str, Array]) -> tuple[Array, Array]:
        return lax.cond(keys.mask(at).any(), some, none, at, tile)

    def body(carry: tuple[Array, Array], step: Any) -> tuple[tuple[Array, Array], None]:
        out, lse = visit(*step)
        return (carry[0] + out, carry[1] + lse), None

    start = none(jnp.zeros(0), {})
    (out, moved), _ = lax.scan(body, start, (_positions(pages), tiles))
    return Partial(out - found.out * moved[..., None], moved)


def _tiles(pages: Pages, pool: Float[Array, "K P Z D"]) -> Float[Array, "N K S D"]:
    """All tiles of a table in one gather, whose derivative is one scatter."""
    count, n = pages.num_tiles, pages.tile_pages
    ids = jnp.pad(pages.ids, (0, count * n - pages.ids.shape[0]), mode="edge")
    read = jnp.take(pool, ids, axis=1, mode="clip")
    read = read.reshape(pool.shape[0], count, n * pages.size, pool.shape[3])
    return jnp.moveaxis(read, 1, 0)


def _positions(pages: Pages) -> Int[Array, "N S"]:
    """Positions of the tokens in these tiles; beyond every range where a slot holds none."""
    count, n = pages.num_tiles, pages.tile_pages
    start = pages.starts()
    start = jnp.pad(start, (0, count * n - start.shape[0]), constant_values=UNUSED)
    return (start[:, None] + jnp.arange(pages.size)).reshape(count, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def computed_by(forward: Callable[..., Any], otherwise: Callable[..., Any], *args: Any) -> Any:
    """`forward(*args)`, with the derivative of `otherwise(*args)`, which computes the same."""
    del otherwise
    return forward(*args)


@computed_by.defjvp
def _computed_by_rule(
    forward: Callable[..., Any], otherwise: Callable[..., Any], primals: Any, tangents: Any
) -> Any:
    del forward
    return jax.jvp(otherwise, primals, tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def not_reversed(x: Array, what: str) -> Array:
    """Returns x, and refuses reverse mode through it with an error that names `what` (a query)."""
    del what
    return x


@not_reversed.defjvp
def _not_reversed_rule(what: str, primals: Any, tangents: Any) -> Any:
    return primals[0], _refusal.bind(tangents[0], what=what)


def _refuse(cotangent: Any, x: Any, *, what: str) -> Any:
    del cotangent, x
    raise RequestError(
        f"no gradient through attention by {what}: which keys it keeps is a choice, and has no "
        "derivative. Full() and Window() can be differentiated, in queries, keys and values; use "
        "one of these where a gradient is taken"
    )


_refusal = Primitive("refuse_reverse_mode")
_refusal.def_impl(lambda x, *, what: x)
_refusal.def_abstract_eval(lambda x, *, what: x)
ad.primitive_jvps[_refusal] = lambda primals, tangents, *, what: (
    _refusal.bind(*primals, what=what),
    _refusal.bind(*tangents, what=what),
)
ad.primitive_transposes[_refusal] = _refuse
batching.primitive_batchers[_refusal] = lambda args, dims, *, what: (
    _refusal.bind(*args, what=what),
    dims[0],
)
mlir.register_lowering(_refusal, lambda context, x, *, what: [x])
