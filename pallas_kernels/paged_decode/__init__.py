"""Attention of one query token per sequence over listed pages: how a decode step reads the cache.

Dense decoding lists all pages of a sequence, in one list for all kv heads; sparse decoding lists
the pages that retrieval selected for each kv head. The result is a partial attention `(out, lse)`,
to be merged with the attention over keys elsewhere: another shard, another tier, the window.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.errors import KernelError
from alaya_jax.pallas_kernels.dispatch import Candidate, Choice, Op, Target, not_a_hopper
from alaya_jax.pallas_kernels.paged_decode import reference, xla
from alaya_jax.pallas_kernels.paged_decode.keys import Keys, PagedDecode, wrong_shapes

HEAD_DIMS = (64, 96, 128)
"""That the Hopper kernel takes."""

DTYPES = ("bfloat16", "float16", "int8", "float8_e4m3fn")
"""That the Hopper kernel takes."""

PAGE_SIZES = (16, 32, 64)
"""Page sizes that the Hopper kernel takes: whole pages fill a tile of 64 keys."""


def _unfit_for_mosaic_gpu(
    target: Target, q: Any, k_pages: Any, v_pages: Any, keys: Keys, *rest: Any, **options: Any
) -> str | None:
    del q, v_pages, rest, options
    if (why := not_a_hopper(target)) is not None:
        return why
    if jnp.dtype(k_pages.dtype).name not in DTYPES:
        return f"pages are {k_pages.dtype}; needs one of {DTYPES}"
    if k_pages.shape[3] not in HEAD_DIMS:
        return f"head_dim is {k_pages.shape[3]}; needs one of {HEAD_DIMS}"
    if k_pages.shape[2] not in PAGE_SIZES:
        return f"the page size is {k_pages.shape[2]} tokens; needs one of {PAGE_SIZES}"
    if keys.page_ids.shape[2] == 0:
        return "the lists of pages have room for no page"
    return None


def _mosaic_gpu(*args: Any, **options: Any) -> PagedDecode:
    from alaya_jax.pallas_kernels.paged_decode import mosaic_gpu  # slow to import

    return mosaic_gpu.paged_decode(*args, **options)


OP = Op(
    "paged_decode",
    (
        Candidate("mosaic_gpu", _unfit_for_mosaic_gpu, _mosaic_gpu, wants_target=True),
        Candidate("xla", None, xla.paged_decode, wants_target=True),
        Candidate("reference", None, reference.paged_decode, automatic=False),
    ),
)


def paged_decode(
    q: Float[Array, "B H D"],
    k_pages: Float[Array, "K P Z D"],
    v_pages: Float[Array, "K P Z D"],
    page_ids: Int[Array, "B J N"],
    count: Int[Array, "B J"],
    length: Int[Array, " B"],
    *,
    starts: Int[Array, "B J N"] | None = None,
    low: Int[Array, " B"] | None = None,
    gap_low: Int[Array, " B"] | None = None,
    gap_high: Int[Array, " B"] | None = None,
    threshold: Float[Array, "B H"] | None = None,
    key_mask: Bool[Array, "B H N Z"] | None = None,
    k_scale: Float[Array, "K P Z"] | None = None,
    v_scale: Float[Array, "K P Z"] | None = None,
    scale: float | None = None,
    want_kept: bool = False,
    implementation: str | None = None,
    target: Target | None = None,
) -> PagedDecode:
    """Softmax attention of one query token per sequence over the keys of the listed pages.

    Args:
      q: queries, rotated and unscaled.
      k_pages, v_pages: the pool of one layer: float, or int8 or fp8 with scales. Keys that are not
        seen may hold anything, even NaN.
      page_ids: the pages that each kv head of each sequence reads. J is K, or 1 if all kv heads
        share a list. Entries past `count` are never read.
      count: how many entries each list has.
      length: positions `low <= p < length` are seen.
      starts: position of the first token of each listed page; None: entry n of a list is page n of
        the sequence.
      low: see `length`; None: 0.
      gap_low, gap_high: positions `gap_low <= p < gap_high` are not seen, because another part
        covers them; None: there is no gap.
      threshold: keys whose raw score `q.k` is below it are not seen: DIPR, exact within a page.
      key_mask: which keys of each listed page a query head sees; None: all.
      k_scale, v_scale: float32 factors of each token's 8-bit keys and values.
      scale: factor of the scores in the softmax; default `D ** -0.5`.
      want_kept: count the keys attended to.
      implementation: one by name, "mosaic_gpu", "xla" or "reference"; None: the first of
        "mosaic_gpu" and "xla" that can run.
      target: the device to compile for; None: the one that JAX traces for.

    Returns:
      the partial attention, the best score, and the count if it is wanted; see `PagedDecode`.

    Raises:
      KernelError: shapes contradict each other, or the named implementation cannot run.
    """
    args, options = _request(
        q,
        k_pages,
        v_pages,
        page_ids,
        count,
        length,
        starts=starts,
        low=low,
        gap_low=gap_low,
        gap_high=gap_high,
        threshold=threshold,
        key_mask=key_mask,
        k_scale=k_scale,
        v_scale=v_scale,
        scale=scale,
        want_kept=want_kept,
    )
    return OP.run(*args, **options, implementation=implementation, target=target)


def choose(
    *args: Any, implementation: str | None = None, target: Target | None = None, **options: Any
) -> Choice:
    """The implementation that `paged_decode` would run, without running it.

    It takes the same arguments; arrays may be `jax.ShapeDtypeStruct`s.

    Raises:
      KernelError: as `paged_decode`.
    """
    args, options = _request(*args, **options)
    return OP.choose(*args, **options, implementation=implementation, target=target)


def _request(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    page_ids: Any,
    count: Any,
    length: Any,
    *,
    starts: Any = None,
    low: Any = None,
    gap_low: Any = None,
    gap_high: Any = None,
    threshold: Any = None,
    key_mask: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    scale: float | None = None,
    want_kept: bool = False,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Checks the arguments and brings them into the form that the implementations take."""
    keys = Keys(page_ids, count, starts, low, length, gap_low, gap_high, threshold, key_mask)
    args = (q, k_pages, v_pages, keys, k_scale, v_scale)
    wrong = wrong_shapes(*args)
    if wrong is not None:
        raise KernelError(f"paged_decode: {wrong}")
    return args, {"scale": scale or q.shape[-1] ** -0.5, "want_kept": want_kept}


__all__ = ["OP", "PagedDecode", "choose", "paged_decode"]
