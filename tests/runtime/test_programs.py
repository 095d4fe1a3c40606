"""The compiled programs give the logits of the model alone, in place and without compiling anew."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax import DIPR, Full, Greedy, Window
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.checkpoint import read_checkpoint
from alaya_jax.errors import RequestError
from alaya_jax.query.plan import Plan
from alaya_jax.runtime import programs
from alaya_jax.runtime.sampling.sampler import init_sampler

GOLDENS = Path(__file__).resolve().parents[1] / "data" / "goldens"
TOLERANCE = 2e-4  # absolute, on logits; float32
PAGES, PAGE = 33, 16


@dataclasses.dataclass
class Cache:
    """Sequences in scattered pages, and the calls that a session makes."""

    config: object
    params: object
    lengths: list[int]

    def __post_init__(self):
        self.kv = PagedKV.create(self.config, PAGES, PAGE, jnp.float32)
        # What a page held before must not matter.
        self.kv = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), self.kv)
        ids = np.random.default_rng(3).permutation(np.arange(1, PAGES))
        batch = len(self.lengths)
        self.pages = jnp.asarray(np.resize(ids, (batch, len(ids) // batch)), jnp.int32)

    def extend(self, tokens, counts, query=None, **options):
        lengths = jnp.asarray(self.lengths, jnp.int32)
        logits, self.kv, read = programs.extend(
            self.params,
            self.kv,
            PageTable(self.pages, lengths),
            jnp.asarray(tokens, jnp.int32),
            jnp.asarray(counts, jnp.int32),
            Plan(query or Full()),
            config=self.config,
            **options,
        )
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        return np.asarray(logits), np.asarray(read.attended)


@pytest.mark.parametrize(
    "name", ["biases_gqa3", "default_gqa1", "dynamic_gqa4", "head_dim_gqa2_tied", "yarn_gqa8"]
)
def test_chunks_give_the_logits_of_one_forward(name):
    """Chunks of unequal size, the last of one token, across page ends; transformers' logits."""
    checkpoint = read_checkpoint(GOLDENS / name, dtype=jnp.float32, progress=False)
    with np.load(GOLDENS / name / "logits.npz") as file:
        ids, expected = file["ids"][0], file["logits"][0]
    # One cache has one set of dynamic frequencies; here that for the golden's length.
    rope_length = len(ids) if checkpoint.config.rope.rope_type == "dynamic" else None
    cache = Cache(checkpoint.config, checkpoint.params, [0])
    done = 0
    for count in (1, 15, 3, len(ids) - 22, 1, 1, 1):
        chunk = np.zeros((1, len(ids)), np.int32)
        chunk[0, :count] = ids[done : done + count]
        logits, _ = cache.extend(chunk, [count], rope_length=rope_length)
        done += count
        np.testing.assert_allclose(logits[0], expected[done - 1], rtol=0, atol=TOLERANCE)
    assert done == len(ids)


@pytest.mark.smoke
def test_ragged_batch_equals_each_alone(tiny_model, all_logits, rng):
    """Three sequences of unequal length: in a chunk some have few new tokens, one has none."""
    rows = [rng.integers(0, 256, n) for n in (50, 23, 9)]
    expected = [all_logits(row) for row in rows]
    cache = Cache(tiny_model.config, tiny_model.params, [0, 0, 0])
    done = [0, 0, 0]
    for counts in ([20, 3, 0], [1, 20, 8], [20, 0, 1], [9, 0, 0]):
        chunk = np.zeros((3, 20), np.int32)
        for b, count in enumerate(counts):
            chunk[b, :count] = rows[b][done[b] : done[b] + count]
        logits, attended = cache.extend(chunk, counts)
        for b, count in enumerate(counts):
            visible = sum(range(done[b] + 1, done[b] + count + 1))
            np.testing.assert_array_equal(attended[:, b], visible)
            done[b] += count
            if count:
                want = expected[b][done[b] - 1]
                np.testing.assert_allclose(logits[b], want, rtol=0, atol=TOLERANCE)
    assert done == [len(row) for row in rows[:1]] + [23, 9]


def decode(cache, token, steps, query=None, sampling=None, running=None, end_ids=(-1,)):
    batch = len(cache.lengths)
    processors, sampler = init_sampler(sampling or Greedy(), [[]] * batch, 256)
    decoded, cache.kv, table, token, _ = programs.decode(
        cache.params,
        cache.kv,
        PageTable(cache.pages, jnp.asarray(cache.lengths, jnp.int32)),
        jnp.asarray(token, jnp.int32),
        jnp.asarray([True] * batch if running is None else running),
        jnp.asarray([list(end_ids)] * batch, jnp.int32),
        sampler,
        jnp.int32(steps),
        Plan(query or Full()),
        config=cache.config,
        processors=processors,
        capacity=8,
    )
    cache.lengths = np.asarray(table.length).tolist()
    return decoded, np.asarray(token)


@pytest.fixture
def filled(tiny_model, rng):
    """Two sequences of 30 and 11 tokens."""
    cache = Cache(tiny_model.config, tiny_model.params, [0, 0])
    rows = rng.integers(3, 256, (2, 30))
    logits, _ = cache.extend(rows, [30, 11])
    return cache, [rows[0].tolist(), rows[1, :11].tolist()], logits.argmax(1)


def test_decode_feeds_each_token_and_ends_each_sequence(filled, greedy):
    cache, rows, first = filled
    expected = np.asarray([greedy(row, 9) for row in rows])
    np.testing.assert_array_equal(first, expected[:, 0])
    decoded, last = decode(cache, first, 5)
    assert int(decoded.steps) == 5
    assert decoded.running.all()
    np.testing.assert_array_equal(decoded.tokens[:5].T, expected[:, 1:6])
    np.testing.assert_array_equal(decoded.tokens[5:], -1)
    assert cache.lengths == [35, 16]
    np.testing.assert_array_equal(decoded.counts.attended[:, 0], sum(range(31, 36)))
    np.testing.assert_array_equal(decoded.counts.attended[:, 1], sum(range(12, 17)))

    end = int(expected[1, 6])
    assert end not in expected[0, 6:9], "another seed is needed"
    decoded, last = decode(cache, last, 3, end_ids=[end])
    np.testing.assert_array_equal(decoded.tokens[:3, 0], expected[0, 6:9])
    assert decoded.tokens[:3, 1].tolist() == [end, -1, -1]
    assert decoded.running.tolist() == [True, False]
    assert cache.lengths == [38, 17]  # the end token was sampled, and never fed

    decoded, last = decode(cache, last, 8, running=[False, False])
    assert int(decoded.steps) == 0
    assert cache.lengths == [38, 17]


def test_decode_stops_where_logits_are_not_finite(filled):
    cache, _, first = filled
    params = jax.tree.map(lambda x: x, cache.params)
    embedding = params["embed"]["embedding"]
    cache.params = {**params, "embed": {"embedding": embedding.at[int(first[1])].set(jnp.nan)}}
    assert first[0] != first[1]
    decoded, _ = decode(cache, first, 3, end_ids=[0])  # no padding that would end it
    assert decoded.tokens[0, 1] == -1
    assert not decoded.running[1]
    assert (np.asarray(decoded.tokens[:3, 0]) >= 0).all()


def pointers(kv):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(kv)]


@pytest.mark.smoke
def test_the_cache_is_updated_in_place(filled):
    """Donated and given back in the same memory: never copied, never there twice."""
    cache, _, first = filled
    before, where = cache.kv, pointers(cache.kv)
    cache.extend(np.zeros((2, 30)), [1, 2])
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert pointers(cache.kv) == where
    before = cache.kv
    decode(cache, first, 4)
    assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert pointers(cache.kv) == where


@pytest.mark.smoke
def test_numbers_do_not_compile_anew(filled):
    """Lengths, counts, steps, beta, window and sampling numbers are data."""
    cache, _, first = filled
    sampled = Greedy()
    decode(cache, first, 1, DIPR(beta=3.0), sampled)
    cache.extend(np.zeros((2, 30)), [3, 1], DIPR(beta=3.0))
    sizes = programs.decode._cache_size(), programs.extend._cache_size()
    decode(cache, first, 4, DIPR(beta=9.5, window=Window(1, 7)), sampled, [True, False], [9])
    cache.extend(np.ones((2, 30)), [0, 30], DIPR(beta=0.25, window=Window(3, 2)))
    assert (programs.decode._cache_size(), programs.extend._cache_size()) == sizes


def test_a_step_takes_a_query_as_well_as_a_plan(tiny_model, rng):
    """As every other place does that asks for attention; what is none is refused by name."""
    c = Cache(tiny_model.config, tiny_model.params, [0])
    tokens = jnp.asarray(rng.integers(3, 256, (1, 20)), jnp.int32)
    args = c.params, c.config, c.kv, PageTable(c.pages, jnp.zeros(1, jnp.int32)), tokens
    query = DIPR(beta=2.0, window=Window(2, 5))
    run = jax.jit(lambda plans: programs.step(*args, jnp.asarray([20]), plans)[0])
    np.testing.assert_array_equal(run(query), run(Plan(query)))
    np.testing.assert_array_equal(run(query), run([query, query]))
    for bad, match in (
        (None, "attention=None"),
        (query.window.sink, "use Full"),
        ([query], "2 la"),
    ):
        with pytest.raises(RequestError, match=match):
            programs.step(*args, jnp.asarray([20]), bad)
