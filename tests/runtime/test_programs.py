"""The compiled programs give the logits of the model alone, in place and without compiling anew."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alaya_jax import DIPR, Flat, Full, Greedy, Window, configs
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.cache.pool import Lent
from alaya_jax.checkpoint import read_checkpoint
from alaya_jax.errors import RequestError
from alaya_jax.frame import Frame
from alaya_jax.index.memory import Memory
from alaya_jax.models import LlamaConfig, llama
from alaya_jax.query.plan import Plan
from alaya_jax.runtime import programs
from alaya_jax.runtime.layer_groups import groups
from alaya_jax.runtime.programs import Fed, Going
from alaya_jax.runtime.sampling.sampler import init_sampler
from alaya_jax.runtime.stack import Stack

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

        self.per_program = None

    def stack(self, rope_length=None):
        return Stack(self.params, Frame(self.config, rope_length), self.per_program)

    def extend(self, tokens, counts, query=None, **options):
        stack, batch = self.stack(**options), len(self.lengths)
        table = PageTable(self.pages, jnp.asarray(self.lengths, jnp.int32))
        tokens, new = jnp.asarray(tokens, jnp.int32), jnp.asarray(counts, jnp.int32)
        lent = Lent(self.kv)
        _, passed = stack.layers(
            lent,
            stack.chain(query if isinstance(query, tuple) else Plan(query or Full()), None),
            stack.between(*tokens.shape),
            stack.start(batch),
            Fed(tokens, new, table),
        )
        self.kv = lent.kv
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        return np.asarray(stack.logits(passed)), np.asarray(passed.counts.attended)


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
    """Rows of new tokens, what was read in all steps, which sequences go on, their last tokens."""
    batch, stack = len(cache.lengths), cache.stack()
    processors, sampler = init_sampler(sampling or Greedy(), [[]] * batch, 256)
    running = jnp.asarray([True] * batch if running is None else running)
    going = Going(
        jnp.asarray(token, jnp.int32)[:, None],
        running,
        jnp.asarray(cache.lengths, jnp.int32),
        running.astype(jnp.int32),
        sampler,
    )
    ends, all_of_them = jnp.asarray([list(end_ids)] * batch, jnp.int32), jnp.ones(batch, bool)
    chain = stack.chain(query if isinstance(query, tuple) else Plan(query or Full()), None)
    lent, x, passed = Lent(cache.kv), stack.between(batch, 1), stack.start(batch)
    rows = []
    for _ in range(steps):
        fed = Fed(going.token, going.count, PageTable(cache.pages, going.length))
        x, passed = stack.layers(lent, chain, x, passed, fed)
        row, passed, going = stack.end(passed, going, ends, all_of_them, processors)
        rows.append(row)
    cache.kv, cache.lengths = lent.kv, np.asarray(going.length).tolist()
    tokens = np.stack([row.token for row in rows])
    read = sum(np.asarray(row.counts.attended) for row in rows)
    return tokens, read, np.asarray(going.running), np.asarray(going.token)[:, 0]


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
    tokens, read, running, last = decode(cache, first, 5)
    assert running.all()
    np.testing.assert_array_equal(tokens.T, expected[:, 1:6])
    assert cache.lengths == [35, 16]
    np.testing.assert_array_equal(read[:, 0], sum(range(31, 36)))
    np.testing.assert_array_equal(read[:, 1], sum(range(12, 17)))

    end = int(expected[1, 6])
    assert end not in expected[0, 6:9], "another seed is needed"
    tokens, read, running, last = decode(cache, last, 3, end_ids=[end])
    np.testing.assert_array_equal(tokens[:, 0], expected[0, 6:9])
    assert tokens[:, 1].tolist() == [end, -1, -1]
    assert running.tolist() == [True, False]
    assert cache.lengths == [38, 17]  # the end token was sampled, and never fed
    np.testing.assert_array_equal(read[:, 1], 17)

    before = jax.tree.map(np.asarray, cache.kv)
    tokens, read, _, _ = decode(cache, last, 2, running=[False, False])
    assert (tokens == -1).all()
    assert (read == 0).all()
    assert cache.lengths == [38, 17]
    for layer, now in zip((*before.k, *before.v), (*cache.kv.k, *cache.kv.v), strict=True):
        np.testing.assert_array_equal(np.asarray(now)[:, 1:], layer[:, 1:])  # page 0 is nobody's


def test_decode_stops_where_logits_are_not_finite(filled):
    cache, _, first = filled
    params = jax.tree.map(lambda x: x, cache.params)
    embedding = params["embed"]["embedding"]
    cache.params = {**params, "embed": {"embedding": embedding.at[int(first[1])].set(jnp.nan)}}
    assert first[0] != first[1]
    tokens, _, running, _ = decode(cache, first, 3, end_ids=[0])  # no padding that would end it
    assert tokens[0, 1] == -1
    assert not running[1]
    assert (tokens[:, 0] >= 0).all()


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
    sizes = programs.layers._cache_size(), programs.end._cache_size()
    decode(cache, first, 4, DIPR(beta=9.5, window=Window(1, 7)), sampled, [True, False], [9])
    cache.extend(np.ones((2, 30)), [0, 30], DIPR(beta=0.25, window=Window(3, 2)))
    assert (programs.layers._cache_size(), programs.end._cache_size()) == sizes


@pytest.mark.slow
def test_a_step_takes_a_query_as_well_as_a_plan(tiny_model, rng):
    """As every other place does that asks for attention; what is none is refused by name."""
    c = Cache(tiny_model.config, tiny_model.params, [0])
    tokens = jnp.asarray(rng.integers(3, 256, (1, 20)), jnp.int32)
    memory = Memory(c.kv, PageTable(c.pages, jnp.zeros(1, jnp.int32)))
    args, frame = (c.params, memory, tokens, jnp.asarray([20])), Frame(c.config)
    query = DIPR(beta=2.0, window=Window(2, 5))
    run = jax.jit(lambda plans: programs.step(*args, plans, frame)[0])
    np.testing.assert_array_equal(run(query), run(Plan(query)))
    np.testing.assert_array_equal(run(query), run([query, query]))
    for bad, match in (
        (None, "attention=None"),
        (query.window.sink, "use Full"),
        ([query], "2 la"),
    ):
        with pytest.raises(RequestError, match=match):
            programs.step(*args, bad, frame)


SEVEN = dataclasses.replace(LlamaConfig.from_hf(configs.load("llama-tiny")), num_hidden_layers=7)
PLANS = {
    "Full": Full(),
    "DIPR": DIPR(beta=2.0, window=Window(2, 5)),
    "first layers Full": tuple(
        Plan(Full()) if i < 2 else Plan(DIPR(beta=2.0, window=Window(2, 5)), Flat())
        for i in range(7)
    ),
    "one plan a layer": tuple(
        Plan(DIPR(beta=1.0 + i, window=Window(2, 5 + i)), Flat()) if i % 3 else Plan(Window(i, 4))
        for i in range(7)
    ),
}


@pytest.mark.parametrize(
    "plans",
    [pytest.param(p, marks=[] if p == "one plan a layer" else pytest.mark.slow) for p in PLANS],
)
def test_the_size_of_groups_changes_nothing(plans, rng):
    """Ragged chunks, then steps in which a sequence ends early; against one program for all."""
    params = llama.init_params(SEVEN, jax.random.key(1))
    rows, query = rng.integers(3, 256, (2, 30)), PLANS[plans]

    def everything(per_program):
        cache = Cache(SEVEN, params, [0, 0])
        cache.per_program = per_program
        said = [*cache.extend(rows, [30, 11], query), *cache.extend(rows, [1, 0], query)]
        said += decode(cache, said[0].argmax(1), 4, query, end_ids=[ends])
        return said, [np.asarray(x)[:, 1:] for x in (*cache.kv.k, *cache.kv.v)]

    ends = -1
    (_, _, _, _, tokens, *_), _ = everything(7)
    ends = int(tokens[1, 1])
    want, want_kv = everything(7)
    for per_program in (1, 5, None) if plans == "first layers Full" else (2,):
        got, kv = everything(per_program)
        for one, other in zip(want, got, strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=2e-6)
        for one, other in zip(want_kv, kv, strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=2e-6)


def test_step_is_what_the_programs_do(tiny_model, rng):
    """The pure core, in a loop of the user's own."""
    tokens = rng.integers(3, 256, (1, 20))
    cache = Cache(tiny_model.config, tiny_model.params, [0])
    memory = Memory(cache.kv, PageTable(cache.pages, jnp.zeros(1, jnp.int32)))
    frame, one = Frame(cache.config), jnp.ones(1, jnp.int32)

    @jax.jit
    def run(params, memory):
        logits, memory, _ = programs.step(
            params, memory, jnp.asarray(tokens), jnp.asarray([20]), Full(), frame
        )

        def body(i, carry):
            memory, token, out = carry
            logits, memory, _ = programs.step(params, memory, token[:, None], one, Full(), frame)
            token = logits.argmax(-1).astype(jnp.int32)
            return memory, token, out.at[i].set(token)

        start = memory, logits.argmax(-1).astype(jnp.int32), jnp.zeros((4, 1), jnp.int32)
        memory, _, out = jax.lax.fori_loop(0, 4, body, start)
        return logits, memory.table.length, out

    logits, length, out = run(cache.params, memory)
    first, _ = cache.extend(tokens, [20])
    want, *_ = decode(cache, first.argmax(1), 4)
    np.testing.assert_allclose(logits, first, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(out, want)
    assert length.tolist() == [24] == cache.lengths


def test_equal_layers_are_compiled_once(tiny_model, rng):
    """However many there are; and another plan compiles its own layers only."""
    config = dataclasses.replace(SEVEN, num_hidden_layers=10)
    cache = Cache(config, llama.init_params(config, jax.random.key(1)), [0])
    before = programs.layers._cache_size()
    cache.extend(rng.integers(3, 256, (1, 9)), [9])
    assert programs.layers._cache_size() - before == 1
    plan = Plan(DIPR(beta=2.0, window=Window(2, 5)), Flat())
    mixed = (*[Plan(Full())] * 5, *[plan] * 5)
    cache.extend(rng.integers(3, 256, (1, 9)), [9], mixed)
    assert programs.layers._cache_size() - before == 2


def test_groups():
    for layers, size in {1: 1, 2: 2, 16: 4, 28: 4, 30: 5, 32: 4, 40: 5, 48: 6, 80: 5}.items():
        found = groups(["layer"] * layers)
        assert {group.layers for group in found} == {size}
        assert [group.first for group in found] == list(range(0, layers, size))
    assert [g.layers for g in groups("a" * 31)] == [5] * 6 + [1]
    assert [g.layers for g in groups("aabbbbb")] == [2, 5]
    assert [g.layers for g in groups("abababa")] == [1] * 7
    assert [tuple(g) for g in groups("aaaaaaa", 3)] == [(0, 3), (3, 3), (6, 1)]
    assert groups("aaaaaaa", 7) == groups("aaaaaaa", 100) == [(0, 7)]
