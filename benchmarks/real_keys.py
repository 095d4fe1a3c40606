"""Queries and keys of a real model, and sketches of its keys, for the benchmarks that ask them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import machine
import numpy as np

from alaya_jax import cache
from alaya_jax.attention import engine
from alaya_jax.attention.retrieve import pivot
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.cache.views import KeyRange, Pages
from alaya_jax.index import MISS, Flat, Sketch, SketchLayer, learnt
from alaya_jax.index.memory import Memory
from alaya_jax.index.select import in_range
from alaya_jax.models.llama import forward
from alaya_jax.query import Full
from alaya_jax.query.plan import Plan

TEXTS = tuple(
    machine.ROOT / path
    for path in ("tests/data/declaration.txt", "alaya_jax/cli/data/constitution.txt", "LICENSE")
)
"""Files of this repository."""

PAGE, CHUNK, QUERIES = 16, 512, 8
WINDOW = (128, 512)
ALPHAS = (0.0144, 0.001)


def asked(name):
    """A sketch, from such as "4" or "learnt1.5"."""
    bits = float(name.removeprefix("learnt"))
    return Sketch(bits, "learnt" if name.startswith("learnt") else "random")


def learnt_of(model):
    """What was learnt of a model; None where nothing was."""
    return learnt.find(model.fingerprint, model.directory)


def bases(spec, found, layers):
    """What each layer's sketch is made by, of what was learnt."""
    if spec.basis == "random":
        return [None] * layers
    if not found:
        raise SystemExit(f"--bits: {spec} needs a basis; run `alaya calibrate` on the model")
    return [layer.basis(spec.bits) for layer in found.layers]


def sketched(spec, config, k, v, basis):
    """The sketch of one layer's pages 1, 2, ..."""
    ids = jnp.arange(1, k.shape[1])
    empty = spec.create(config, k.shape[1], PAGE)
    return _built(empty.seen_by(basis), k, v, ids, jnp.full(len(ids), PAGE))


_built = jax.jit(SketchLayer.build)


def stretched(model, factor):
    """The model with its RoPE stretched by YaRN to so many times its length."""
    config = model.config
    rope = dataclasses.replace(
        config.rope,
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=config.max_position_embeddings,
    )
    longest = int(factor * config.max_position_embeddings)
    config = dataclasses.replace(config, rope=rope, max_position_embeddings=longest)
    return dataclasses.replace(model, config=config)


def tokens_of(model, files, n):
    """The first n tokens of texts, again from the start where they are too short."""
    return np.resize(model.encode("\n\n".join(path.read_text() for path in files)), n)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="kv")
def chunk(params, kv, table, tokens, config):
    """One chunk of a prefill, and its last queries of every layer [L, K, G, QUERIES, D]."""
    count = jnp.full(1, tokens.shape[0])

    def attend(layer, q, k, v, state):
        kv, queries = state
        kv = cache.append(kv, layer, k, v, table, count)
        out, _ = engine.attend(Plan(Full()), q, Memory(kv, table).layer(layer), count)
        last = q[0, -QUERIES:].reshape(QUERIES, k.shape[2], -1, k.shape[3])
        return out, (kv, (*queries, jnp.transpose(last, (1, 2, 0, 3))))

    positions = table.length[:, None] + jnp.arange(tokens.shape[0])
    _, (kv, queries) = forward(
        params, config, tokens[None], positions, attend, (kv, ()), logits_at=jnp.zeros(1, jnp.int32)
    )
    return kv, jnp.stack(queries)


def prefill(model, tokens, lengths):
    """The cache, of pages 1, 2, ..., and queries by length."""
    pages = len(tokens) // PAGE
    kv = PagedKV.create(model.config, pages + 1, PAGE, jnp.float32)
    queries = {}
    for start in range(0, len(tokens), CHUNK):
        table = PageTable(jnp.arange(1, pages + 1)[None], jnp.full(1, start))
        new = jnp.asarray(tokens[start : start + CHUNK])
        kv, last = chunk(model.params, kv, table, new, model.config)
        if start + CHUNK in lengths:
            queries[start + CHUNK] = last
    return kv, queries


@functools.partial(jax.jit, static_argnames=("n", "low", "high", "miss"))
def scans(layer, q, k, n, low, high, miss=MISS):
    """True scores, estimates and errors of positions low..high; [K, G, T, n]."""
    pages = Pages(k, k, jnp.arange(1, n // PAGE + 1))
    keys = KeyRange(jnp.full(q.shape[2], low), jnp.full(q.shape[2], high))
    true, scan = Flat().scan(q, pages, keys).estimate, layer.scan(q, pages, keys, miss)
    return true, jnp.zeros_like(true), scan.estimate, scan.error


@functools.partial(jax.jit, static_argnames=("n", "low", "high"))
def in_question(layer, q, k, n, low, high, beta, seed):
    """The keys that DIPR rescores."""
    pages = Pages(k, k, jnp.arange(1, n // PAGE + 1))
    keys = KeyRange(jnp.full(q.shape[2], low), jnp.full(q.shape[2], high))
    scan = layer.scan(q, pages, keys)
    best = jnp.maximum(seed, pivot(q, pages, scan))
    return in_range(scan.estimate + scan.error, best, beta)
