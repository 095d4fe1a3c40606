"""Estimators of attention mass by blocks, for `sparse_prefill.py`. The library has the first alone.

Each gives, for the last `T` queries of a context in blocks of Q_BLOCK, an estimate [K, G, QB, R, N]
of the mass in N blocks of keys: R rows a block of queries.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.index import SketchLayer

Q_BLOCK, SAMPLES, LAST, SINK = 128, 8, 16, 16


@jax.jit
def weights(q, k, positions):
    """True attention weights [K, G, T, S]."""
    scores = jnp.einsum("kgtd,ksd->kgts", q, k) * q.shape[-1] ** -0.5
    seen = jnp.arange(k.shape[1]) <= positions[:, None]
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


def by_block(p, kv_block, q_blocks):
    """[K, G, R, S] of rows in order -> [K, G, QB, R / QB, N]."""
    heads, group = p.shape[:2]
    return p.reshape(heads, group, q_blocks, -1, p.shape[-1] // kv_block, kv_block).sum(-1)


@functools.partial(jax.jit, static_argnames="stride")
def antidiagonal(q, k, positions, stride):
    """XAttention: mean score of antidiagonals of stride x stride, softmax over the strides."""
    heads, group, t, dim = q.shape
    rows = q.reshape(heads, group, t // stride, stride, dim)[:, :, :, ::-1]
    rows = rows.reshape(heads, group, t // stride, -1)
    keys = k.reshape(heads, -1, stride * dim)
    scores = jnp.einsum("kgtd,ksd->kgts", rows, keys) * dim**-0.5 / stride
    seen = jnp.arange(keys.shape[1]) <= positions[stride - 1 :: stride, None] // stride
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)


@functools.partial(jax.jit, static_argnames="kv_block")
def pooled(q, k, positions, kv_block):
    """FlexPrefill, MInference: the mean query against the mean key of each block."""
    heads, group, t, dim = q.shape
    rows = q.reshape(heads, group, t // Q_BLOCK, Q_BLOCK, dim).mean(3)
    keys = k.reshape(heads, -1, kv_block, dim).mean(2)
    scores = jnp.einsum("kgtd,ksd->kgts", rows, keys) * dim**-0.5
    seen = jnp.arange(keys.shape[1]) * kv_block <= positions[Q_BLOCK - 1 :: Q_BLOCK, None]
    return jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)[:, :, :, None]


@jax.jit
def sketched(q, k_pages, ids, positions):
    """Weights by the 4-bit sketch."""
    heads, pages, size, dim = k_pages.shape
    layer = SketchLayer(
        jnp.zeros((heads, pages, size, dim // 2), jnp.uint8),
        jnp.zeros((heads, pages, size), jnp.float16),
        jnp.zeros((heads, pages, size), jnp.float16),
        jnp.zeros((heads, pages, dim), jnp.int8),
        jnp.zeros((heads, pages), jnp.float16),
        jnp.zeros((heads, pages, dim), jnp.int8),
        jnp.zeros((heads, pages), jnp.float16),
        jnp.zeros((heads, pages, 2), jnp.float16),
    ).build(k_pages, k_pages, ids, jnp.full(len(ids), size))
    keys = KeyRange(jnp.zeros_like(positions), positions + 1)
    estimate = layer.scan(q, Pages(k_pages, k_pages, ids), keys).estimate
    return jax.nn.softmax(estimate * dim**-0.5, axis=-1)


def estimates(q, k_pages, ids, p, positions, kv_block):
    """Name -> [K, G, QB, R, N]. `p` are the true weights."""
    heads, _, size, dim = k_pages.shape
    k = k_pages[:, ids].reshape(heads, -1, dim)
    blocks = q.shape[2] // Q_BLOCK
    true = by_block(p, kv_block, blocks)
    step = Q_BLOCK // SAMPLES
    yield "samples", true[:, :, :, step - 1 :: step]
    yield "every query (the truth)", true
    yield "last queries", true[:, :, :, -LAST:]
    means = q.reshape(*q.shape[:2], -1, step, dim).mean(3)
    yield (
        "means of queries",
        by_block(weights(means, k, positions[step - 1 :: step]), kv_block, blocks),
    )
    yield "mean query x mean keys", pooled(q, k, positions, kv_block)
    for stride in (8, 16):
        diagonal = antidiagonal(q, k, positions, stride)
        yield f"antidiagonals, stride {stride}", by_block(diagonal, kv_block // stride, blocks)
    if size <= kv_block:
        sampled = sketched(q[:, :, step - 1 :: step], k_pages, ids, positions[step - 1 :: step])
        yield "samples, 4-bit sketch", by_block(sampled, kv_block, blocks)


@functools.partial(jax.jit, static_argnames=("every", "shared"))
def choose(estimate, always, p, every, shared):
    """Blocks in order of mean estimate, until rows hold p: every row, or their mean.

    One list for each head, or shared by the G heads of a kv head. bool [K, G, QB, N].
    """
    heads, group, blocks, _, n = estimate.shape
    rows = jnp.moveaxis(estimate, 1, 2 if shared else 1)
    rows = rows.reshape(heads, 1 if shared else group, blocks, -1, n)
    mean = rows.mean(3)
    order = jnp.argsort(-jnp.where(always, 2.0, mean), axis=-1, stable=True)
    held = jnp.take_along_axis(rows if every else mean[:, :, :, None], order[:, :, :, None], -1)
    held = jnp.cumsum(held, axis=-1)
    count = 1 + jnp.max(jnp.sum(held < p, axis=-1), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return jnp.broadcast_to((rank < count[..., None]) | always, (heads, group, blocks, n))


def compare(k, q, n):
    """Rows of the comparison: `k` pools and `q` of the layers to compare on, at context n."""
    t = q[0].shape[2]
    positions = jnp.arange(n - t, n)
    sums: dict = {}
    for k_pages, rows in zip(k, q, strict=True):
        ids = jnp.arange(1, n // k_pages.shape[2] + 1)
        keys = k_pages[:, ids].reshape(k_pages.shape[0], -1, k_pages.shape[3])
        p = weights(rows, keys, positions)
        for kv_block in (16, 64, 128):
            true = by_block(p, kv_block, t // Q_BLOCK)
            start = np.arange(n // kv_block) * kv_block
            seen = start <= np.asarray(positions[Q_BLOCK - 1 :: Q_BLOCK, None])
            own = start + kv_block > np.asarray(positions[::Q_BLOCK, None])
            always = seen & ((start < SINK) | own)
            for name, estimate in estimates(rows, k_pages, ids, p, positions, kv_block):
                for share in (0.9, 0.95):
                    for every, shared in ((False, False), (False, True), (True, True)):
                        if every and name != "samples":
                            continue
                        kept = choose(estimate, always, share, every, shared) & seen
                        mass = jnp.einsum("kgqtn,kgqn->kgqt", true, kept.astype(jnp.float32))
                        key = (kv_block, name, share, every, shared)
                        sums.setdefault(key, []).append(
                            (
                                kept.mean() / seen.mean(),
                                mass.mean(),
                                jnp.quantile(mass, 0.01),
                                (mass >= share).mean(),
                            )
                        )
    for (kv_block, name, share, every, shared), values in sums.items():
        density, mass, worst, held = np.mean(np.asarray(values), axis=0)
        yield {
            "kv_block": kv_block,
            "estimator": name,
            "recovery": share,
            "until": "every row" if every else "the mean",
            "lists": "a kv head" if shared else "a head",
            "density": round(float(density), 4),
            "mass": round(float(mass), 4),
            "worst_1pct": round(float(worst), 4),
            "held": round(float(held), 4),
        }
