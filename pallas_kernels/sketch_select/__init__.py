"""Which pages may hold keys in range of a query, by a scan of the keys' sketch.

A single scan computes the best lower bound, and an upper bound for each page: 4 G bytes, beside
more than Z D / 2 bytes of sketch (16 beside 1,218 at Z 16, D 128, G 4). The threshold is known only
after the scan and is then compared with the upper bounds. A second scan against the threshold would
read everything again to save 3 percent; one scan against a running best would keep pages that the
final best rules out.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alaya_jax.errors import KernelError
from alaya_jax.pallas_kernels.dispatch import Candidate, Choice, Op, Target, not_a_hopper
from alaya_jax.pallas_kernels.sketch_select import reference, xla
from alaya_jax.pallas_kernels.sketch_select.request import (
    WORD,
    Bounds,
    Codes,
    Query,
    Selected,
    Signs,
    in_range,
    select,
    wanted,
)

_HEAD_DIMS = {Codes: (64, 128), Signs: (64, 96, 128)}
# The factors of centres that queries have taken on for `Signs` may leave float16's range.
_DTYPES = {Codes: (jnp.bfloat16, jnp.float16), Signs: (jnp.bfloat16,)}
_PAGE_SIZES = (16, 32, 64, 128)
_POOL_TOKENS = 512  # that the kernel may copy at once
_GROUP = 8
_WORDS = 16  # of signs a key


def _unfit_for_mosaic_gpu(
    target: Target, query: Query, keys: Codes | Signs, *_: Any, **__: Any
) -> str | None:
    """Why this kernel cannot run a call; None if it can."""
    if (why := not_a_hopper(target)) is not None:
        return why
    kv_heads, pool, size = keys.scale.shape
    heads, dim = query.q.shape[1:]
    if query.q.dtype not in _DTYPES[type(keys)]:
        allowed = " or ".join(jnp.dtype(x).name for x in _DTYPES[type(keys)])
        return f"queries are {query.q.dtype}; needs {allowed}"
    if dim not in _HEAD_DIMS[type(keys)]:
        return f"head_dim is {dim}; needs one of {_HEAD_DIMS[type(keys)]}"
    if isinstance(keys, Signs) and keys.codes.shape[2] > _WORDS:
        return f"a key has {WORD * keys.codes.shape[2]} signs; needs at most {WORD * _WORDS}"
    if size not in _PAGE_SIZES:
        return f"the page size is {size} tokens; needs one of {_PAGE_SIZES}"
    if pool * size < _POOL_TOKENS:
        return f"the pool has {pool} pages; needs at least {_POOL_TOKENS} tokens"
    if heads > _GROUP * kv_heads:
        return f"{heads // kv_heads} heads a kv head; needs at most {_GROUP}"
    return None


def _mosaic_gpu(*args: Any, **options: Any) -> Bounds:
    from alaya_jax.pallas_kernels.sketch_select import mosaic_gpu  # slow to import

    return mosaic_gpu.bounds(*args, **options)


OP = Op(
    "sketch_select",
    (
        Candidate("mosaic_gpu", _unfit_for_mosaic_gpu, _mosaic_gpu, wants_target=True),
        Candidate("xla", None, xla.bounds),
        Candidate("reference", None, reference.bounds, automatic=False),
    ),
)
"""The scan. What follows from its `Bounds` is XLA in every implementation."""


def sketch_select(
    query: Query,
    keys: Codes | Signs,
    pages: Int[Array, "B N"],
    low: Int[Array, " B"],
    high: Int[Array, " B"],
    *,
    beta: float | Float[Array, "#B H"],
    best: Float[Array, "B H"] | None = None,
    capacity: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    target: Target | None = None,
) -> Selected:
    """The pages that may hold a key that scores at least the best score minus beta.

    A page counts if this may be so for any head of the group. A key scores at most `estimate +
    error`. The best score is at least the largest `estimate - error`, and at least `best`, a score
    that some key is known to have, such as the best of the window.

    Args:
      query, keys: see `Query`, and `Codes` or `Signs`.
      pages: the pages of each sequence, in order.
      low, high: only keys at positions `low <= p < high` count; others may hold anything.
      beta: range below the best raw score, at least 0; inf keeps every page with a key that counts.
      best: a raw score that each head is known to reach; -inf if none is.
      capacity: C, the length of the lists; default N, which always suffices.
      scale: if given, also return the log-sum-exp of `scale * estimate` over each page's keys.
      implementation: one by name, "mosaic_gpu", "xla" or "reference"; None: the first of
        "mosaic_gpu" and "xla" that can run.
      target: the device to compile for; None: the one that JAX traces for.

    Returns:
      lists of pages, and the score that the range was measured from; see `Selected`.

    Raises:
      KernelError: shapes contradict each other, or the named implementation cannot run.
    """
    found = bounds(
        query, keys, pages, low, high, scale=scale, implementation=implementation, target=target
    )
    beta = jnp.broadcast_to(jnp.asarray(beta, jnp.float32), query.step.shape)
    capacity = pages.shape[1] if capacity is None else capacity
    return select(found, pages, low, high, beta, best, keys.scale.shape[2], capacity)


def bounds(
    query: Query,
    keys: Codes | Signs,
    pages: Int[Array, "B N"],
    low: Int[Array, " B"],
    high: Int[Array, " B"],
    *,
    scale: float | None = None,
    implementation: str | None = None,
    target: Target | None = None,
) -> Bounds:
    """The scan alone, for `wanted` and `select`; arguments as in `sketch_select`.

    Raises:
      KernelError: as `sketch_select`.
    """
    _check(query, keys, pages, low, high)
    found = OP.run(
        query, keys, pages, low, high, scale=scale, implementation=implementation, target=target
    )
    return found if query.offset is None else found.plus(query.offset, scale)


def choose(
    query: Query,
    keys: Codes | Signs,
    pages: Any,
    low: Any,
    high: Any,
    *,
    implementation: str | None = None,
    target: Target | None = None,
    scale: float | None = None,
    **_: Any,
) -> Choice:
    """The implementation that `sketch_select` would run, without running it.

    It takes the same arguments; arrays may be `jax.ShapeDtypeStruct`s.

    Raises:
      KernelError: as `sketch_select`.
    """
    _check(query, keys, pages, low, high)
    return OP.choose(
        query, keys, pages, low, high, scale=scale, implementation=implementation, target=target
    )


def _check(query: Query, keys: Codes | Signs, pages: Any, low: Any, high: Any) -> None:
    batch, heads, dim = query.q.shape
    kv_heads, pool, size = keys.scale.shape
    rows, levels = (batch, heads), query.integers.shape[-1]
    signs = isinstance(keys, Signs)
    of_page = (levels // WORD, size) if signs else (size, levels // 2)
    expected = {
        "query.integers": (query.integers, (*rows, levels if signs else dim)),
        "query.step": (query.step, rows),
        "query.of_spread": (query.of_spread, rows),
        "query.of_scale": (query.of_scale, rows),
        "keys.codes": (keys.codes, (kv_heads, pool, *of_page)),
        "keys.spread": (keys.spread, (kv_heads, pool, size)),
        "keys.centre": (keys.centre, (kv_heads, pool, dim // 2 if signs else dim)),
        "keys.unit": (keys.unit, (kv_heads, pool)),
        "pages": (pages, (batch, *pages.shape[1:])),
        "low": (low, (batch,)),
        "high": (high, (batch,)),
    }
    wrong = [
        f"{name} is {tuple(x.shape)}, not {shape}"
        for name, (x, shape) in expected.items()
        if tuple(x.shape) != shape
    ]
    if query.offset is not None and query.offset.shape != rows:
        wrong.append(f"query.offset is {tuple(query.offset.shape)}, not {rows}")
    if signs and levels % WORD:
        wrong.append(f"{levels} integers of a query do not fill words of {WORD} signs")
    if heads % kv_heads:
        wrong.append(f"{heads} heads are no multiple of {kv_heads} kv heads")
    if wrong:
        raise KernelError(f"sketch_select: {'; '.join(wrong)}")


__all__ = [
    "OP",
    "Bounds",
    "Codes",
    "Query",
    "Selected",
    "Signs",
    "bounds",
    "choose",
    "in_range",
    "select",
    "sketch_select",
    "wanted",
]
