"""The pool: page tables of any width, transfers of any size, Ctrl-C while the cache is away, what
is known of pages that are written again, threads, and memory that is not there.
"""

import gc
import subprocess
import sys
import threading
from typing import Any

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import alaya_jax as aj
from alaya_jax.cache import UNUSED
from alaya_jax.cache.pool import PagedSequence, PagePool
from alaya_jax.errors import CacheFullError, DatabaseError
from alaya_jax.query.plan import indexes_of, plan_for


@pytest.fixture
def narrow(tiny_model, monkeypatch):
    """64 pages of 16 tokens, with tables and transfers that grow early."""
    monkeypatch.setattr("alaya_jax.cache.tables.TABLE_WIDTH", 2)
    monkeypatch.setattr("alaya_jax.cache.pool.TRANSFER_WIDTH", 2)
    return PagePool(tiny_model.config, tiny_model.dtype, 65, 16, "Budget(device='520KiB')")


@pytest.mark.parametrize(("pages", "width"), [(0, 2), (2, 2), (3, 8), (8, 8), (9, 32), (33, 64)])
def test_a_table_is_as_wide_as_its_longest_sequence_needs(narrow, pages, width):
    """In few widths, since each is compiled, none wider than the pool; padding names no page out
    of range.
    """
    sequences = [PagedSequence(), PagedSequence()]
    narrow.reserve(sequences[0], 16 * pages)
    sequences[0].length = max(16 * pages - 3, 0)
    table = narrow.table(sequences)
    assert table.pages.shape == (2, width)
    np.testing.assert_array_equal(table.pages[0, :pages], sequences[0].pages)
    assert 0 <= table.pages.min() <= table.pages.max() < 65
    assert table.length.tolist() == [sequences[0].length, 0]


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 90), st.booleans()), max_size=12),
)
def test_the_table_of_a_spread_pool_says_where_each_page_is(steps):
    """Whatever was reserved and released before: each device's entries, in order, by position."""
    mesh = aj.make_mesh(data=2, context=4)
    config: Any = None  # there are no arrays
    # 64 pages are used: 4 parts of 16.
    pool = PagePool(config, "float32", 67, 16, "Budget()", where=mesh)
    assert pool.num_pages == 64
    assert pool.capacity_tokens == 60 * 16
    sequences = [PagedSequence() for _ in range(3)]
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
    hole, neighbour, sequence = PagedSequence(), PagedSequence(), PagedSequence()
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
    sequence = PagedSequence()
    narrow.reserve(sequence, 5)
    before = narrow.kv

    def program(kv):
        ctrl_c()
        for leaf in jax.tree.leaves(kv):
            leaf.delete()
        return jax.tree.map(lambda x: np.ones(x.shape), type(kv).create(*args))

    args = (narrow.config, 65, 16, "float32")
    with pytest.raises(KeyboardInterrupt), narrow.lend() as lent:
        lent.kv = program(lent.kv)
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
    lend = db.pool.lend

    def interrupted():
        ctrl_c()
        return lend()

    monkeypatch.setattr(db.pool, "lend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.batch.make_room([2])
    monkeypatch.undo()
    assert session.prefill(rest).shape == (1, 256)
    session.close()
    assert db.pool.free_tokens == free


SKETCHED = aj.Plan(aj.DIPR(beta=2.0, window=aj.Window(4, 12)), aj.Sketch())


def require_true_indexes(db, *sessions):
    """What the pool's index knows of full pages is what it finds by looking at them anew."""
    indexes = indexes_of(plan_for(SKETCHED, db.model.config, 0), 2)
    sequences = [s for session in sessions for s in session.sequences]
    full = [s.pages[: s.length // db.pool.page_size] for s in sequences]
    pages = np.unique(np.concatenate(full))

    def known():
        layers = db._catalogue.indexes.cover(indexes, sequences).layers
        return [np.array(leaf)[:, pages] for leaf in jax.tree.leaves(layers)]

    before = known()
    for state in db._catalogue.indexes._indexes.values():
        state.built[pages] = 0
    for was, now in zip(before, known(), strict=True):
        np.testing.assert_array_equal(was, now)


@pytest.mark.smoke
@pytest.mark.parametrize("leave", ["remove", "evict"])
def test_a_page_written_again_is_indexed_again_when_its_context_has_gone(db, rng, leave):
    """The context had filled and indexed it; who shares it up to its middle holds it alone now."""
    document = rng.integers(3, 256, 70)
    context = db.import_context(document)
    reader, rest = db.create_session([*document, 9])
    reader.prefill(rest, SKETCHED)
    other = rng.integers(3, 256, 40)
    session, rest = db.create_session([*document[:40], *other])
    reader.close()
    shared = session.sequences[0].pages[2]
    if leave == "remove":
        db.remove(context)
    else:
        db._catalogue.drop(context)
    session.prefill(rest)
    assert session.sequences[0].pages[2] == shared, "written in place"
    require_true_indexes(db, session)


def test_a_page_written_again_is_indexed_again_when_the_parent_has_gone(db, rng):
    """Forked in the middle of a generation, which then filled the page that both hold."""
    parent, rest = db.create_session(rng.integers(3, 256, 40))
    running = aj.generate(parent, rest, max_new_tokens=60, attention=SKETCHED)
    for _ in range(4):
        next(running)
    fork = parent.fork()
    shared = fork.sequences[0].pages[2]
    for _ in range(40):
        next(running)
    parent.close()
    fork.prefill(rng.integers(3, 256, 30))
    assert fork.sequences[0].pages[2] == shared, "written in place"
    require_true_indexes(db, fork)


def test_indexes_are_true_whatever_is_appended_forked_stored_and_closed(db, rng):
    """A walk of 120 random steps, keys and values of one's own."""
    tokens = rng.integers(3, 256, 200)
    sessions = [db.create_session([5])[0]]
    for _ in range(120):
        session = sessions[rng.integers(len(sessions))]
        match rng.integers(6):
            case 0 | 1:
                n = int(rng.choice([1, 5, 16]))
                if session.length + n < 150:
                    k = rng.standard_normal((1, n, 2, 16)).astype(np.float32)
                    for layer in range(2):
                        session.update(None, k + layer, k, layer)
            case 2:
                sessions.append(session.fork())
            case 3 if session.length:
                db.store(session, tokens=tokens[: session.length])
            case 4:
                sessions.append(db.create_session(tokens[: 1 + rng.integers(120)])[0])
            case 5:  # the latest is alone
                while len(sessions) > 1:
                    sessions.pop(0).close()
                for context in db.contexts:
                    db.remove(context)
        require_true_indexes(db, *sessions)


def test_pages_of_sessions_that_nobody_can_reach_are_found(db, rng):
    """In a circle of references they wait for the garbage collector; a request does not."""
    gc.disable()
    try:
        for _ in range(3):
            session, rest = db.create_session(rng.integers(3, 256, 480))
            session.batch.make_room([len(rest)])
            circle = [session]
            circle.append(circle)
            del session, circle
    finally:
        gc.enable()


def test_threads_take_turns(db, rng):
    """Each with its own sessions, through an index that all share; right answers, no page lost."""
    db.import_context(shared := rng.integers(3, 256, 70))
    prompts = [[*shared, i] for i in range(4)]

    def ask(prompt):
        session, rest = db.create_session(prompt)
        with session:
            run = aj.generate(session, rest, max_new_tokens=8, prefill=SKETCHED, attention=SKETCHED)
            return [t.id for t in run]

    right, wrong = [ask(p) for p in prompts], []
    free = db.pool.free_tokens

    def work(first):
        try:
            for i in range(6):
                j = (first + i) % len(prompts)
                if (got := ask(prompts[j])) != right[j]:
                    wrong.append((j, got))
                db.import_context(np.full(20 + 3 * first + i, 50 + first))
        except BaseException as error:
            wrong.append(error)
            raise

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    for context in db.contexts:
        db._catalogue.drop(context)
    assert db.pool.free_tokens == 1024 > free


def test_a_session_may_be_collected_while_another_thread_is_at_work(db, rng):
    """Its pages come back without waiting for the lock: a collector that waits may do so for
    ever.
    """
    session, rest = db.create_session(rng.integers(3, 256, 37))
    session.batch.make_room([len(rest)])
    with db.pool.lock:
        thread = threading.Thread(target=session.close)
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert db.pool.free_tokens == 1024


@pytest.mark.parametrize("what", ["pages", "Sketch"])
def test_memory_that_is_not_there(db, rng, monkeypatch, what):
    """When pages, or an index beside them, are taken: named with the setting."""

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.")

    taken = "cache.paged.page_zeros" if what == "pages" else "index.Sketch.create"
    monkeypatch.setattr(f"alaya_jax.{taken}", refuse)
    session, rest = db.create_session(rng.integers(3, 256, 37))
    with pytest.raises(CacheFullError, match=rf"lower Budget\(device={db.budget.device}\)"):
        session.prefill(rest, SKETCHED)
    monkeypatch.undo()
    assert session.prefill(rest, SKETCHED).shape == (1, 256)


def test_a_process_may_end_while_a_program_runs():
    """As after Ctrl-C in an answer: the runtime would abort it (SIGABRT)."""
    code = """
import contextlib, sys, types
import jax, jax.numpy as jnp
from alaya_jax.cache.pool import PagePool
slow = jax.jit(lambda x: (jax.lax.fori_loop(0, 500, lambda i, x: jnp.sin(x @ x), x), x + 1))
x = jnp.eye(400)
pool = types.SimpleNamespace(kv=x, alone=contextlib.nullcontext)
pool.within_memory = contextlib.nullcontext
with PagePool.lend(pool) as lent:
    lent.result, lent.kv = slow(lent.kv)
sys.exit(130)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_pages_are_allocated_beside_what_the_caller_does(tiny_model):
    """On the device that is the caller's default; the same zeros as without."""
    device = jax.local_devices()[-1]
    pool = PagePool(tiny_model.config, tiny_model.dtype, 65, 16, "Budget(device='520KiB')")
    assert not pool.allocated
    with jax.default_device(device):
        pool.prepare()
        pool.prepare()
    chex.assert_tree_is_on_device(pool.kv, device=device)
    for array, shape in zip(jax.tree.leaves(pool.kv), jax.tree.leaves(pool.abstract), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        assert not np.asarray(array).any()
    assert pool.allocated
