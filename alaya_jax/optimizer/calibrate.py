"""Measures how many keys a model's heads need: makes a `Calibration`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alaya_jax.attention.paged import attend_range
from alaya_jax.attention.window import Split
from alaya_jax.cache.views import KeyRange, Pages, over_query_blocks, score_range
from alaya_jax.errors import RequestError
from alaya_jax.frame import Frame
from alaya_jax.index import of_pages, recover
from alaya_jax.index.learnt import LEAST_TOKENS, Learnt, Moments
from alaya_jax.model import Model
from alaya_jax.models.llama import Params, forward
from alaya_jax.models.rope import inverse_frequencies, rotate, rotation
from alaya_jax.optimizer.calibration import PAGE, SURE, Calibration, keep
from alaya_jax.progress import progress_bar
from alaya_jax.query import Window
from alaya_jax.settings import under_own_settings

RECOVERIES = (0.9, 0.95, 0.99)

_RANGES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 15.0)
"""Ranges, over sqrt(D), within which keys are counted."""

_BLOCK = 128  # query tokens attended to at once


@under_own_settings
def calibrate(
    model: Model,
    texts: Sequence[Any],
    *,
    length: int | None = None,
    queries: int = 32,
    recoveries: tuple[float, ...] = RECOVERIES,
    window: Window | None = None,
    save: bool = True,
    progress: bool = True,
) -> Calibration:
    """Measures how many keys each head needs, on texts; what `Auto` predicts from is kept.

    Sketches learn from the same texts, if they have 2,048 tokens together, the basis in which they
    round keys (`Sketch(basis="learnt")`), for contexts of any length that the model takes. A DB
    that is opened afterwards, or has found none before, uses it.

    Args:
      model: whose heads.
      texts: strings or lists of token ids; the longer the better. Each is cut into pieces.
      length: of the pieces, tokens; default the longest text's, at most 4,096.
      queries: sampled in each piece, near each of its lengths: whole, half, a quarter.
      recoveries: shares of the mass to measure for.
      window: tokens that count as attended in any case; default `Window()`.
      save: keep it where `Auto` finds it (see `places`).
      progress: shows a bar on stderr when it is a terminal.

    Raises:
      RequestError: the texts are too short for a query to see keys outside the window, or a
        recovery is not between 0 and 1.
    """
    window = window or Window()
    if not recoveries or not all(0 < p < 1 for p in recoveries):
        raise RequestError(f"calibrate(recoveries={recoveries}): shares above 0 and below 1")
    recoveries = tuple(sorted(recoveries))
    rows = [model.check_tokens(model.encode(t) if isinstance(t, str) else t) for t in texts]
    longest = max((len(row) for row in rows), default=0)
    length = min(length or min(longest, 4096), model.length_limit, max(longest, 1))
    seen = [n for n in (length // 4, length // 2, length) if n >= 2 * (window.sink + window.recent)]
    if not seen:
        raise RequestError(
            f"calibrate: the longest text has {longest:,} tokens and pieces have {length:,}; for "
            f"keys beside the window to matter they need {2 * (window.sink + window.recent):,}"
        )
    pieces = [row[at : at + length] for row in rows for at in range(0, max(len(row), 1), length)]
    pieces = [piece for piece in pieces if len(piece) >= seen[0]]
    rng = np.random.default_rng(0)
    ranges = tuple(float(np.sqrt(model.config.head_dim) * x) for x in _RANGES)
    found: dict[int, list[tuple[np.ndarray, ...]]] = {n: [] for n in seen}
    moments: list[tuple[Moments, int]] = []
    width = -(-length // _BLOCK) * _BLOCK
    with progress_bar("calibrating", sum(map(len, pieces)), show=progress) as advance:
        for piece in pieces:
            fits = [n for n in seen if n <= len(piece)]
            at = [np.sort(rng.integers(max(int(0.9 * n), 1), n, queries)) for n in fits]
            at += [np.zeros(queries, np.int64)] * (len(seen) - len(fits))  # one program for all
            tokens = np.zeros(width, np.int32)
            tokens[: len(piece)] = piece
            measured = _needed(
                model.params,
                jnp.asarray(tokens),
                len(piece),
                jnp.asarray(np.concatenate(at), jnp.int32),
                jnp.asarray(recoveries, jnp.float32),
                jnp.asarray(ranges, jnp.float32),
                window,
                frame=model.frame,
            )
            *measured, of_piece = measured
            moments.append((of_piece, len(piece)))
            arrays = [np.asarray(x, np.float64) for x in measured]
            for i, n in enumerate(fits):
                part = slice(i * queries, (i + 1) * queries)
                found[n].append(tuple(x[..., part] for x in arrays))
            advance(len(piece))
    # Each [L, R or J, heads, queries].
    joined = {
        n: [np.concatenate(x, axis=-1) for x in zip(*parts, strict=True)]
        for n, parts in found.items()
        if parts
    }
    keys, read, pages, in_range, read_in_range = (
        np.stack([x[i].mean(-1).swapaxes(0, 1) for x in joined.values()], axis=1)
        for i in (0, 1, 2, 4, 5)
    )
    beta = np.concatenate([x[3] for x in joined.values()], axis=-1)
    result = Calibration(
        model=model.name,
        fingerprint=model.fingerprint,
        window=window,
        recoveries=recoveries,
        lengths=tuple(joined),
        queries=tuple(x[0].shape[-1] for x in joined.values()),
        keys=keys,
        read=read,
        pages=pages,
        beta=np.quantile(beta, SURE, axis=-1).swapaxes(0, 1),
        ranges=ranges,
        in_range=in_range,
        read_in_range=read_in_range,
        learnt=_learnt(model, moments),
    )
    if save:
        keep(result, model.directory)
    return result


def _learnt(model: Model, moments: list[tuple[Moments, int]]) -> Learnt | None:
    """What sketches learn, if that was enough text."""
    if sum(n for _, n in moments) < LEAST_TOKENS:
        return None
    inv_freq, _ = inverse_frequencies(model.config, model.rope_length)
    return Learnt.of(moments, inv_freq, model.length_limit, model.fingerprint)


@functools.partial(jax.jit, static_argnames=("frame",))
def _needed(
    params: Params,
    tokens: Int[Array, " T"],
    length: Int[Array, ""],
    at: Int[Array, " n"],
    recoveries: Float[Array, " R"],
    ranges: Float[Array, " J"],
    window: Window,
    *,
    frame: Frame,
) -> tuple[Array, Array, Array, Array, Array, Array, Moments]:
    """The model over one piece of text, with full attention.

    Args:
      params, frame: the model.
      tokens: of the piece; what is behind its end is never seen from `at`.
      length: of the text, tokens.
      at: positions of the sampled queries.
      recoveries: shares of the mass.
      ranges: of scores.
      window: tokens attended in any case.

    Returns:
      keys needed int32 [L, R, H, n], for all heads of a group together [L, R, K, n], keys of the
      pages that those need [L, R, K, n], and their range of scores float32 [L, R, H, n]; keys
      within each range int32 [L, J, H, n], and for all heads of a group together [L, J, K, n];
      and the moments of all queries and keys.
    """
    config, positions = frame.config, jnp.arange(tokens.shape[0])
    inv_freq, _ = inverse_frequencies(config, frame.rope_length)

    def turned_back(x: Array, by: Array) -> Array:
        """Vectors [T, heads, D] as they were that many positions before."""
        return rotate(x[None].astype(jnp.float32), *rotation(-by[None], inv_freq, 1.0))[0]

    def moments_of(q: Array, k: Array) -> Moments:
        """Of [T, H, D] and [T, K, D]."""
        t, kv_heads, dim = k.shape
        product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        here = (positions < length)[:, None, None]
        rows = jnp.where(here, turned_back(q, positions), 0.0).reshape(t, kv_heads, -1, dim)
        count = length // PAGE
        # Keys of a page turn together.
        keys = turned_back(k, positions // PAGE * PAGE).reshape(-1, PAGE, kv_heads, dim)
        whole = (jnp.arange(t // PAGE) < count)[:, None, None]
        centres = jnp.where(whole, jnp.mean(keys, axis=1), 0.0)
        rest = jnp.where(whole[:, None], keys - centres[:, None], 0.0)
        mean = jnp.sum(centres, axis=0) / count
        apart = jnp.where(whole, centres - mean, 0.0)
        return Moments(
            product("tkgd,tkge->kde", rows, rows) / (length * rows.shape[2]),
            product("nzkd,nzke->kde", rest, rest) / (count * PAGE),
            product("nkd,nke->kde", apart, apart) / count,
            mean,
        )

    def attend(layer: int, q: Array, k: Array, v: Array, state: Any) -> tuple[Array, Any]:
        del layer
        t, kv_heads, dim = k.shape[1:]
        learnt = moments_of(q[0], k[0])
        # [1, T, K, D] as pages of PAGE tokens
        k, v = (jnp.moveaxis(x[0], 1, 0).reshape(kv_heads, -1, PAGE, dim) for x in (k, v))
        pages = Pages(k, v, jnp.arange(t // PAGE))
        rows = jnp.moveaxis(q[0].reshape(t, kv_heads, -1, dim), 0, 2)

        def causal(q: Array, p: Array) -> Array:
            return attend_range(q, pages, KeyRange(jnp.zeros_like(p), p + 1))[0].out

        out = over_query_blocks(causal, rows, positions, _BLOCK)
        out = jnp.moveaxis(out, 2, 0).reshape(q.shape).astype(q.dtype)

        sampled, zero, end = rows[:, :, at], jnp.zeros_like(at), at + 1
        inside_range = Split.of(window, end).inside
        inside, best = attend_range(sampled, pages, inside_range)
        scores = score_range(sampled.astype(pages.operand_dtype), pages, KeyRange(zero, end))
        scores = jnp.where(inside_range.mask(pages.all_positions()), -jnp.inf, scores)

        top = jnp.maximum(jnp.max(scores, axis=-1), best)[..., None]

        def counted(kept: Array) -> tuple[Array, Array]:
            each = jnp.sum(kept, axis=-1, dtype=jnp.int32)
            return each.reshape(-1, len(at)), jnp.sum(kept.any(1), axis=-1, dtype=jnp.int32)

        by_page = of_pages(scores, PAGE, dim)

        def needed(recovery: Array) -> tuple[Array, Array, Array, Array]:
            found = recover(scores, inside.lse, best, recovery, dim, margin=0.0)
            pages = recover(by_page, inside.lse, best, recovery, dim, margin=0.0)
            _, whole = counted(pages.kept)
            return *counted(found.kept), PAGE * whole, found.beta.reshape(-1, len(at))

        def within(beta: Array) -> tuple[Array, Array]:
            return counted((scores >= top - beta) & (scores > -jnp.inf))

        found = *jax.lax.map(needed, recoveries), *jax.lax.map(within, ranges), learnt
        return out, (*state, found)

    _, by_layer = forward(
        params,
        config,
        tokens[None],
        positions[None],
        attend,
        (),
        logits_at=jnp.zeros(1, jnp.int32),
        rope_length=frame.rope_length,
    )
    return jax.tree.map(lambda *x: jnp.stack(x), *by_layer)
