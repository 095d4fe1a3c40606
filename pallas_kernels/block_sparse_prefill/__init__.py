"""Prefill: a chunk of new tokens attends to the cached tokens before it and to itself.

Attention is dense or over listed blocks of keys, and may skip tiles by a rule as it visits them. It
is causal: the query at position n sees the keys at positions 0 to n.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alaya_jax.errors import KernelError
from alaya_jax.pallas_kernels.block_sparse_prefill import reference, xla
from alaya_jax.pallas_kernels.block_sparse_prefill.layout import (
    QUERY_BLOCK,
    ROWS,
    Lists,
    Prefill,
)
from alaya_jax.pallas_kernels.dispatch import Candidate, Choice, Op, Target, not_a_hopper

_HEAD_DIMS = (64, 128)


def _unfit_for_mosaic_gpu(
    target: Target, q: Any, k_pages: Any, v_pages: Any, *_: Any, **named: Any
) -> str | None:
    """Why this kernel cannot run a call; None if it can."""
    if (why := not_a_hopper(target)) is not None:
        return why
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries are {q.dtype}; needs bfloat16 or float16"
    if {k_pages.dtype, v_pages.dtype} != {q.dtype}:
        return f"pages are {k_pages.dtype} and queries {q.dtype}; needs one dtype"
    if q.shape[3] not in _HEAD_DIMS:
        return f"head_dim is {q.shape[3]}; needs one of {_HEAD_DIMS}"
    if named["block_kv"] not in (64, 128):
        return f"block_kv is {named['block_kv']}; needs 64 or 128"
    if k_pages.shape[2] % 8:
        return f"the page size is {k_pages.shape[2]} tokens; needs a multiple of 8"
    return None


def _mosaic_gpu(*args: Any, **options: Any) -> Prefill:
    from alaya_jax.pallas_kernels.block_sparse_prefill import mosaic_gpu  # slow to import

    return mosaic_gpu.prefill(*args, **options)


OP = Op(
    "block_sparse_prefill",
    (
        Candidate("mosaic_gpu", _unfit_for_mosaic_gpu, _mosaic_gpu, wants_target=True),
        Candidate("xla", None, xla.prefill, wants_target=True),
        Candidate("reference", None, reference.prefill, automatic=False),
    ),
)


def block_sparse_prefill(
    q: Float[Array, "B T H D"],
    k_pages: Float[Array, "K P Z D"],
    v_pages: Float[Array, "K P Z D"],
    pages: Int[Array, "B N"],
    lengths: Int[Array, " B"],
    count: Int[Array, " B"],
    *,
    blocks: Int[Array, "B J QB M"] | None = None,
    block_counts: Int[Array, "B J QB"] | None = None,
    block_kept: Int[Array, "B J QB"] | None = None,
    beta: float | Float[Array, " H"] | None = None,
    block_kv: int = 128,
    scale: float | None = None,
    implementation: str | None = None,
    target: Target | None = None,
) -> Prefill:
    """Attention of T new tokens, whose keys and values are already in the pages.

    Without `blocks`, a query attends to every key up to its own. With them, the queries of block i
    (`QUERY_BLOCK` queries) attend to those keys, up to their own, that lie in the listed blocks.
    The blocks around the queries' own positions are no exception and have to be listed. Blocks are
    visited in the order of the list; without lists, from the queries' own block down to the first.

    With `beta`, a tile (`ROWS` queries of one head, one block of keys) is skipped if in every row
    its largest raw score is more than beta below the largest raw score that the row has met so far.
    That is at most the largest of all, so no key of DIPR's answer, `{j : q.k_j >= max_s q.k_s -
    beta}`, is lost. This is the tile skipping of Block-Sparse FlashAttention (arXiv 2512.07011),
    with DIPR's threshold in place of a calibrated one. A tile is never skipped if it has a key at
    or after the position of its first query, or a row without a query; nor are the first
    `block_kept` blocks of a list.

    Args:
      q: queries after RoPE, unscaled.
      k_pages, v_pages: the pool. Slots past the end of a sequence may hold anything, even NaN.
      pages: the pages of each sequence, in order. Those past its end are not read.
      lengths: tokens of each sequence before the chunk.
      count: new tokens of each sequence, at most T. Rows past them give zeros and an lse of -inf.
      blocks: numbers of blocks of `block_kv` keys, each at most once, for each kv head or each
        query head (J is K or H). Block j holds the keys from position `j * block_kv` on. Entries
        past `block_counts` are not read.
      block_counts: how many blocks each list has.
      block_kept: how many of these, from the first on, `beta` may not skip; default none.
      beta: range below the best raw score, at least 0; one for all heads or one for each.
      block_kv: keys per block, a multiple of the page size.
      scale: factor of the scores in the softmax; default `D ** -0.5`.
      implementation: one by name, "mosaic_gpu", "xla" or "reference"; None: the first of
        "mosaic_gpu" and "xla" that can run.
      target: the device to compile for; None: the one that JAX traces for.

    Returns:
      the output, its log-sum-exp, and how many tiles were skipped; see `Prefill`.

    Raises:
      KernelError: shapes contradict each other, or the named implementation cannot run.
    """
    args, options = _request(
        q,
        k_pages,
        v_pages,
        pages,
        lengths,
        count,
        blocks=blocks,
        block_counts=block_counts,
        block_kept=block_kept,
        beta=beta,
        block_kv=block_kv,
        scale=scale,
    )
    return OP.run(*args, **options, implementation=implementation, target=target)


def choose(
    *args: Any, implementation: str | None = None, target: Target | None = None, **options: Any
) -> Choice:
    """The implementation that `block_sparse_prefill` would run, without running it.

    It takes the same arguments; arrays may be `jax.ShapeDtypeStruct`s.

    Raises:
      KernelError: as `block_sparse_prefill`.
    """
    args, options = _request(*args, **options)
    return OP.choose(*args, **options, implementation=implementation, target=target)


def _request(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    pages: Any,
    lengths: Any,
    count: Any,
    *,
    blocks: Any = None,
    block_counts: Any = None,
    block_kept: Any = None,
    beta: Any = None,
    block_kv: int = 128,
    scale: float | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Checks the arguments and brings them into the form that the implementations take."""
    lists = None
    if blocks is not None and block_counts is not None:
        kept = jnp.zeros(block_counts.shape, jnp.int32) if block_kept is None else block_kept
        lists = Lists(blocks, block_counts, kept)
    wrong = _wrong_shapes(q, k_pages, v_pages, pages, lengths, count, lists, block_kv)
    if (blocks is None) != (block_counts is None):
        wrong = "blocks and block_counts come together"
    if wrong is not None:
        raise KernelError(f"block_sparse_prefill: {wrong}")
    if beta is not None and not isinstance(beta, jax.ShapeDtypeStruct):
        beta = jnp.broadcast_to(jnp.asarray(beta, jnp.float32), (q.shape[2],))
    return (q, k_pages, v_pages, pages, lengths, count), {
        "lists": lists,
        "beta": beta,
        "block_kv": block_kv,
        "scale": scale or q.shape[-1] ** -0.5,
    }


def _wrong_shapes(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    pages: Any,
    lengths: Any,
    count: Any,
    lists: Lists | None,
    block_kv: int,
) -> str | None:
    """Which shapes contradict each other; None if none do."""
    batch, tokens, heads, dim = q.shape
    kv_heads, _, page, of_keys = k_pages.shape
    if k_pages.shape != v_pages.shape or of_keys != dim:
        return f"keys are {k_pages.shape}, values {v_pages.shape}, and queries have D = {dim}"
    if heads % kv_heads:
        return f"{heads} heads are no multiple of {kv_heads} kv heads"
    if block_kv % page:
        return f"block_kv = {block_kv} is no multiple of the page size {page}"
    if not pages.shape[0] == lengths.shape[0] == count.shape[0] == batch:
        return (
            f"pages {pages.shape}, lengths {lengths.shape}, count {count.shape}: batch is {batch}"
        )
    if lists is not None:
        q_blocks = -(-tokens // QUERY_BLOCK)
        per = lists.count.shape
        if not lists.blocks.shape[:3] == lists.kept.shape == per or per not in (
            (batch, kv_heads, q_blocks),
            (batch, heads, q_blocks),
        ):
            return (
                f"lists are {lists.blocks.shape} and their counts {per}; they begin with batch "
                f"{batch}, {kv_heads} kv heads or {heads} heads, and {q_blocks} blocks of "
                f"{QUERY_BLOCK} queries"
            )
    return None


__all__ = ["OP", "QUERY_BLOCK", "ROWS", "Prefill", "block_sparse_prefill", "choose"]
