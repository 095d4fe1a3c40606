"""Contexts that are read where they lie give the answers of contexts in the pool."""

import os

import jax
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import CacheFullError, ContextError, RequestError
from alaya_jax.index import host as host_index

WINDOW = aj.Window(8, 24)
PLANS = {
    "full": aj.Full(),
    "window": WINDOW,
    "best": aj.TopK(20, window=WINDOW),
    "range": aj.DIPR(beta=8.0, window=WINDOW),
    "promise": aj.DIPR(recovery=0.9, window=WINDOW),
    "graph": aj.Plan(aj.DIPR(beta=8.0, window=WINDOW), aj.Graph(queries=1.0)),
    "sketch": aj.Plan(aj.DIPR(beta=8.0, window=WINDOW), aj.Sketch()),
    "sketch, a promise": aj.Plan(aj.DIPR(recovery=0.9, window=WINDOW), aj.Sketch()),
    "tail": aj.Plan(aj.DIPR(recovery=0.8, window=WINDOW), aj.Sketch(), tail=True),
    "block": aj.Plan(aj.DIPR(beta=8.0, window=WINDOW), aj.Block("bounds"), by="page"),
}


@pytest.fixture
def document(rng):
    return rng.integers(32, 126, 230)


def answers(db, prompt, tier, attention=None, tokens=6, **options):
    """Token ids and the logits of the last prompt token, by bits."""
    session, rest = db.create_session(prompt, tier=tier, **options)
    with session:
        fork = session.fork()
        logits = np.asarray(fork.prefill(rest))
        ids = [t.id for t in aj.generate(session, rest, max_new_tokens=tokens, attention=attention)]
    return ids, logits, session.reused


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("tail", "sketch, a promise")
        else name
        for name in PLANS
    ],
)
def test_any_plan_answers_as_in_the_pool(open_db, document, rng, name):
    db = open_db()
    context = db.import_context(document)
    if name == "graph":
        db.build_index(context, aj.Graph(queries=1.0), progress=False)
    db.close()
    db = open_db()
    prompt = [*document, *rng.integers(32, 126, 5)]
    expected, logits, reused = answers(db, prompt, "device", PLANS[name])
    assert reused == [230]
    for tier in ("host", "device", "host"):
        ids, at, again = answers(db, prompt, tier, PLANS[name])
        assert (ids, again) == (expected, reused)
        np.testing.assert_array_equal(at, logits)


@pytest.mark.parametrize(
    "size", [16, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 7, 64))]
)
def test_a_prefix_is_cut_at_any_token_of_a_page(open_db, document, size):
    db = open_db(page_size=size, pages=1024 // size)
    db.import_context(document)
    db.close()
    db = open_db(page_size=size, pages=1024 // size)
    for cut in range(128, 128 + size, max(1, size // 8)):
        prompt = [*document[:cut], 33, 34, 35]
        expected, logits, reused = answers(db, prompt, "device", tokens=2)
        assert reused == [cut]
        ids, at, _ = answers(db, prompt, "host", tokens=2)
        assert ids == expected
        np.testing.assert_array_equal(at, logits)


def test_a_context_larger_than_the_pool_answers(open_db, document, greedy):
    """What is read in the files takes nothing of the budget; what does not fit is refused first."""
    db = open_db()
    db.import_context(document)
    db.close()
    small = open_db(pages=4)
    prompt = [*document, 40, 41]
    expected = greedy(np.asarray(prompt), 6)
    session, rest = small.create_session(prompt)
    assert small.pool.free_tokens == small.pool.capacity_tokens == 48
    with session:
        assert [t.id for t in aj.generate(session, rest, max_new_tokens=6)] == expected
        assert session.reused == [230]
    assert small.pool.free_tokens == 48
    with pytest.raises(CacheFullError, match="the prompt has 86 tokens behind 224 that are read"):
        small.create_session([*document, *range(40, 120)])
    with pytest.raises(CacheFullError, match=r"raise Budget\(device="):
        small.create_session(prompt, tier="device")
    assert small.pool.free_tokens == 48
    with pytest.raises(RequestError, match="tier='disk'"):
        small.create_session(prompt, tier="disk")


@pytest.mark.slow
def test_what_never_was_in_the_pool(open_db, document, rng):
    """Keys and values of one's own, and a graph over them: stored, indexed and asked beside a pool
    that could not hold them.
    """
    big = open_db()
    with big.create_session(document)[0] as session:
        session.prefill(document)
        kv = [session.kv(layer) for layer in range(session.model.config.num_hidden_layers)]
    plan = PLANS["graph"]
    context = big.import_context(document, kv)
    big.build_index(context, plan.index, progress=False)
    prompt = [*document, *rng.integers(32, 126, 5)]
    expected, logits, _ = answers(big, prompt, "device", plan)
    small = open_db(path="small", pages=4)
    context = small.import_context(document, kv)
    small.build_index(context, plan.index, progress=False)
    ids, at, reused = answers(small, prompt, None, plan)
    assert (ids, reused) == (expected, [230])
    np.testing.assert_array_equal(at, logits)
    session, _ = small.create_session(prompt)
    for layer, (k, v) in enumerate(kv):
        got = session.kv(layer)
        np.testing.assert_array_equal(got[0], k)
        np.testing.assert_array_equal(got[1], v)


def test_forks_and_batches_read_what_lies_there(open_db, document, greedy, rng):
    """Sequences of one batch that lie in different places too."""
    db = open_db()
    db.import_context(document)
    other = rng.integers(32, 126, 77)
    db.import_context(other)
    db.close()
    db = open_db()
    rows = [[*document, 40], [*other, 41, 42], [50, 51, 52], [*document[:130], 60]]
    session, rest = db.create_session(rows, tier="host")
    assert session.reused == [230, 77, 0, 130]
    assert db.pool.free_tokens == 1024
    generation = aj.generate(session, rest, max_new_tokens=4)
    list(generation)
    assert generation.ids == [greedy(np.asarray(row), 4) for row in rows]
    session.close()
    session, rest = db.create_session([*document, 40], tier="host")
    first = next(aj.generate(session, rest, max_new_tokens=1)).id
    fork = session.fork()
    want = greedy(np.asarray([*document, 40]), 5)
    for one in (session, fork):
        ids = [t.id for t in aj.generate(one, max_new_tokens=4)]
        assert [first, *ids] == want
    session.close()
    fork.close()
    assert db.pool.free_tokens == 1024


def test_what_a_session_of_mapped_pages_holds_can_be_stored_and_read(open_db, document, greedy):
    db = open_db()
    db.import_context(document)
    db.close()
    db = open_db()
    session, rest = db.create_session([*document, 40, 41], tier="host")
    session.prefill(rest)
    k, v = session.kv(1)
    found = session.explain(analyze=True, attention=aj.DIPR(beta=8.0, window=WINDOW))
    assert found.to_dict()["in_files"] == [224], "the page behind them was copied, and written to"
    assert "read where they lie in the database's files [224]" in str(found)
    stored = db.store(session)
    session.close()
    assert stored.num_tokens == 232
    db.close()
    db = open_db()
    for tier in ("device", "host"):
        session, rest = db.create_session([*document, 40, 41, 42], tier=tier)
        assert session.reused == [232]
        again = session.kv(1)
        np.testing.assert_array_equal(again[0], k)
        np.testing.assert_array_equal(again[1], v)
        ids = [t.id for t in aj.generate(session, rest, max_new_tokens=3)]
        assert ids == greedy(np.asarray([*document, 40, 41, 42]), 3)


def test_pages_stay_while_a_session_reads_them(open_db, document, greedy, rng):
    """Removed and its space wanted by others: what is read is what was stored."""
    db = open_db()
    context = db.import_context(document)
    db.close()
    db = open_db()
    session, rest = db.create_session([*document, 40], tier="host")
    db.remove(context.id)
    for _ in range(3):
        db.import_context(rng.integers(32, 126, 200))
    ids = [t.id for t in aj.generate(session, rest, max_new_tokens=4)]
    assert ids == greedy(np.asarray([*document, 40]), 4)


def test_a_damaged_page_is_refused_by_name(open_db, document, tmp_path):
    db = open_db()
    context = db.import_context(document)
    db.close()
    flip(sorted((tmp_path / "db" / "segments").rglob("v.*"))[1], 100)
    db = open_db()
    session, rest = db.create_session([*document, 40], tier="host")
    with pytest.raises(ContextError, match=context.id):
        session.prefill(rest)
    session.close()
    assert db.contexts[0].problem
    session, rest = db.create_session([*document, 40], tier="host")
    assert session.reused == [0]


def flip(path, at):
    """Changes a bit of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        assert byte
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("kind", ["k", "v"])
def test_only_what_an_answer_came_from_is_verified(open_db, document, tmp_path, kind):
    """A window's pages, in a prefill and in steps that follow it: the others are left alone until
    somebody reads them; then they are refused, before a token comes of them.
    """
    db = open_db()
    context = db.import_context(document)
    db.close()
    db = open_db()
    prompt = [*document, 40]
    options = {"max_new_tokens": 6, "attention": WINDOW, "prefill": WINDOW}
    session, rest = db.create_session(prompt, tier="device")
    with session:
        expected = [t.id for t in aj.generate(session, rest, **options)]
    db.close()
    db = open_db()
    session, rest = db.create_session(prompt, tier="host")
    host = session.sequences[0].host
    for path in (tmp_path / "db" / "segments").rglob(f"{kind}.*"):
        flip(path, int(host.pages[5]) * host.layers[0].k[0, 0].nbytes + 3)
    with session:
        assert [t.id for t in aj.generate(session, rest, **options)] == expected
        seen = host._verified.any(axis=(0, 1, 2))
        assert seen[[0, 12, 13]].all()
        assert not seen[3:10].any()
        assert len(list(aj.generate(session, [41], **options))) == 6
        with pytest.raises(ContextError, match=f"context {context.id} in .*tokens 80 to 95"):
            session.prefill([42])
    del host


def test_a_mapped_file_enters_a_program_as_it_is(open_db, document):
    """No copy: else a context would have to fit into memory."""
    db = open_db()
    db.import_context(document)
    db.close()
    db = open_db()
    session, _ = db.create_session([*document, 40], tier="host")
    host = session.sequences[0].host
    with db._catalogue.store.mapped(db.contexts[0].id) as mapped:
        for layer, pages in enumerate(host.layers):
            for array, there in zip((pages.k, pages.v), mapped.layer(layer), strict=True):
                assert isinstance(array, jax.Array)
                assert array.shape == there.shape
                assert array.unsafe_buffer_pointer() == there.ctypes.data


@pytest.mark.parametrize(
    "name", ["sketch", pytest.param("sketch, a promise", marks=pytest.mark.slow), "block"]
)
def test_what_was_learnt_of_a_page_ends_with_its_context(open_db, rng, name):
    """Another context takes the same place in the files: its keys are looked at anew."""
    db, slots = open_db(), []
    for _ in range(2):
        document = rng.integers(32, 126, 230)
        context = db.import_context(document)
        logits = []
        for tier in ("device", "host"):
            session, rest = db.create_session([*document, 40, 41], tier=tier)
            with session:
                logits.append(np.asarray(session.prefill(rest, PLANS[name])))
                host = session.sequences[0].host
        slots.append(host.pages.tolist())
        np.testing.assert_array_equal(*logits)
        del host
        db.remove(context.id)
    assert slots[0] == slots[1], "else nothing was shown"


def asked(db, prompt, tier, plan):
    """Ids, and the logits of the last prompt token, all by a plan."""
    session, rest = db.create_session(prompt, tier=tier)
    with session:
        with session.fork() as fork:
            logits = np.asarray(fork.prefill(rest, plan))
        ids = [t.id for t in aj.generate(session, rest, max_new_tokens=4, attention=plan)]
    return ids, logits


@pytest.fixture
def looked(monkeypatch):
    """Pages of mapped files that an index was made of."""
    real, looked = host_index._of_pages, []

    def of_pages(empty, basis, host, ids):
        looked.extend(np.asarray(ids)[1:].tolist())
        return real(empty, basis, host, ids)

    monkeypatch.setattr(host_index, "_of_pages", of_pages)
    return looked


@pytest.mark.parametrize("name", ["sketch", "block"])
def test_what_an_index_knows_is_found_by_the_next(open_db, document, tmp_path, looked, name):
    """No page is looked at for it; and whatever is wrong with it, the answer is the pool's."""
    prompt, plan = [*document, 40, 41], PLANS[name]
    db = open_db()
    db.import_context(document)
    expected, logits = asked(db, prompt, "device", plan)
    assert db.stats().bytes_leaves == 0
    db.close()
    for damaged in (None, False, True):
        if damaged:
            for path in (tmp_path / "db").glob("segments/*/leaves/*/0*"):
                harm(path)
        db = open_db()
        looked.clear()
        ids, at = asked(db, prompt, "host", plan)
        assert ids == expected
        np.testing.assert_array_equal(at, logits)
        assert bool(looked) == (damaged is not False)
        assert db.stats().bytes_leaves > 0
        db.close()


def harm(path):
    """Overwrites a part of each piece of data in a file with what makes floats NaN."""
    with path.open("r+b") as file:
        at, size = 0, path.stat().st_size
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            if start:  # births and checksums come first: they stay, and no longer match
                os.pwrite(file.fileno(), b"\xff" * min(2000, at - start), start)


def test_what_a_session_learnt_is_stored_with_its_context(open_db, document, looked):
    """For processes that read the context where it lies."""
    db, plan = open_db(), PLANS["sketch"]
    session, rest = db.create_session(document)
    with session:
        list(aj.generate(session, rest, max_new_tokens=2, attention=plan))
        context = db.store(session)
    config = db.model.config
    page = plan.index.page_bytes(config, 16, np.float32) * config.num_hidden_layers
    assert db._catalogue.store.leaves(context.id) == {repr(plan.index): 14 * page}
    assert db.check(context) == []
    expected, logits = asked(db, [*document, 40], "device", plan)
    db.close()
    db = open_db()
    ids, at = asked(db, [*document, 40], "host", plan)
    assert ids == expected
    np.testing.assert_array_equal(at, logits)
    assert looked == []
