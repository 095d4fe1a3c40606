"""The pool: page tables of any width, transfers of any size, and Ctrl-C while the cache is away."""

import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import alaya_jax as aj
from alaya_jax.cache import UNUSED
from alaya_jax.errors import CacheFullError, DatabaseError
from alaya_jax.pool import PagePool, Sequence


@pytest.fixture
def narrow(tiny_model, monkeypatch):
    """64 pages of 16 tokens, with tables and transfers that grow early."""
    monkeypatch.setattr("alaya_jax.pool.TABLE_WIDTH", 2)
    monkeypatch.setattr("alaya_jax.pool.TRANSFER_WIDTH", 2)
    return PagePool(tiny_model, 65, 16, "Budget(device='520KiB')")


@pytest.mark.parametrize(("pages", "width"), [(0, 2), (2, 2), (3, 8), (8, 8), (9, 32), (33, 64)])
def test_a_table_is_as_wide_as_its_longest_sequence_needs(narrow, pages, width):
    """In few widths, since each is compiled, none wider than the pool; padding names no page out
    of range.
    """
    sequences = [Sequence(), Sequence()]
    narrow.reserve(sequences[0], 16 * pages)
    sequences[0].length = max(16 * pages - 3, 0)
    table = narrow.table(sequences)
    assert table.pages.shape == (2, width)
    np.testing.assert_array_equal(table.pages[0, :pages], sequences[0].pages)
    assert 0 <= table.pages.min() <= table.pages.max() < 65
    assert table.length.tolist() == [sequences[0].length, 0]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 90), st.booleans()), max_size=12),
)
def test_the_table_of_a_spread_pool_says_where_each_page_is(steps):
    """Whatever was reserved and released before: each device's entries, in order, by position."""
    model = SimpleNamespace(
        mesh=aj.make_mesh(data=2, context=4), rules=aj.ShardingRules(), config=None
    )
    pool = PagePool(model, 67, 16, "Budget()")  # of which 64 are used: 4 parts of 16
    assert pool.num_pages == 64
    assert pool.capacity_tokens == 60 * 16
    sequences = [Sequence() for _ in range(3)]
    for which, tokens, release in steps:
        sequence = sequences[which]
        if release:
            pool.release(sequence)
            continue
        try:
            pool.reserve(sequence, tokens)
        except CacheFullError:
            continue
        # Inside a page only while nobody shares it; a shared one would be copied on the device.
        sequence.length += tokens
    table = pool.table(sequences)
    assert table.length.tolist() == [s.length for s in sequences]
    assert table.pages.sharding.spec == PartitionSpec(None, "context")
    ids, start = (np.asarray(x).reshape(3, 4, -1) for x in (table.pages, table.start))
    assert ids.min() >= 0
    assert ids.max() < 16
    assert np.all(np.diff(start, axis=-1) >= 0)
    for b, sequence in enumerate(sequences):
        shard, entry = np.nonzero(start[b] < UNUSED)
        order = np.argsort(start[b][shard, entry])
        got = (16 * shard + ids[b][shard, entry])[order]
        np.testing.assert_array_equal(got, sequence.pages)
        np.testing.assert_array_equal(
            start[b][shard, entry][order], 16 * np.arange(len(sequence.pages))
        )


@pytest.mark.parametrize("tokens", [1, 16, 37, 90])
def test_what_is_written_is_read(narrow, rng, tokens):
    """Between a hole and a neighbour, whose pages stay as they are."""
    hole, neighbour, sequence = Sequence(), Sequence(), Sequence()
    for one in (hole, neighbour):
        narrow.reserve(one, 20)
        one.length = 20
    other = rng.standard_normal((2, 2, 20, 16)).astype(np.float32)
    narrow.write(neighbour, 1, *other)
    narrow.release(hole)
    narrow.reserve(sequence, tokens)
    sequence.length = tokens
    k, v = rng.standard_normal((2, 2, tokens, 16)).astype(np.float32)
    narrow.write(sequence, 1, k, v)
    for got, want in zip(narrow.read(sequence, 1), (k, v), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(narrow.read(neighbour, 1), other)
    assert not np.any(narrow.read(sequence, 0))


def test_ctrl_c_waits_until_the_cache_is_back(narrow, ctrl_c):
    sequence = Sequence()
    narrow.reserve(sequence, 5)
    before = narrow.kv

    def program(params, kv):
        ctrl_c()
        for leaf in jax.tree.leaves(kv):
            leaf.delete()
        return jax.tree.map(lambda x: np.ones(x.shape), type(kv).create(*args))

    args = (narrow._model.config, 65, 16, "float32")
    with pytest.raises(KeyboardInterrupt):
        narrow.run(program, kv_result=None)
    assert before.k[0].is_deleted()
    assert narrow._kv is not before
    assert narrow._kv.k[0][0, 0, 0, 0] == 1


def test_a_lost_cache_says_so(db, rng):
    """A program that failed after it had taken the cache; the contexts are on disk."""
    document = rng.integers(3, 256, 20)
    db.import_context(document)
    for leaf in jax.tree.leaves(db.pool.kv):
        leaf.delete()
    session, rest = db.create_session([*document, 5])
    with pytest.raises(DatabaseError, match="open the database again"):
        session.prefill(rest)


def test_a_thread_that_is_not_the_main_one(db, greedy, rng):
    """Signals are the main thread's business; the rest works anywhere."""
    prompt, got = rng.integers(3, 256, 37), []

    def work():
        session, rest = db.create_session(prompt)
        got.extend(t.id for t in aj.generate(session, rest, max_new_tokens=5))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert got == greedy(prompt, 5)


def test_ctrl_c_while_a_shared_page_is_copied_loses_no_page(db, rng, monkeypatch, ctrl_c):
    document = rng.integers(3, 256, 20)
    db.import_context(document)
    free = db.pool.free_tokens
    session, rest = db.create_session([*document, 5, 6])
    run = db.pool.run

    def interrupted(*args, **options):
        ctrl_c()
        return run(*args, **options)

    monkeypatch.setattr(db.pool, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.make_room([2])
    monkeypatch.undo()
    assert session.prefill(rest).shape == (1, 256)
    session.close()
    assert db.pool.free_tokens == free


def test_a_process_may_end_while_a_program_runs():
    """As after Ctrl-C in an answer: the runtime would abort it (SIGABRT)."""
    code = """
import sys, types
import jax, jax.numpy as jnp
from alaya_jax.pool import PagePool
slow = jax.jit(lambda _, x: (jax.lax.fori_loop(0, 500, lambda i, x: jnp.sin(x @ x), x), x + 1))
x = jnp.eye(400)
pool = types.SimpleNamespace(_model=types.SimpleNamespace(params=(), mesh=None), kv=x)
PagePool.run(pool, slow, kv_result=1)
sys.exit(130)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")
