"""The engine's thread beside the pages of contexts: what is evicted, and for whom."""

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.cache.pool import PagedSequence
from alaya_jax.engine import loop
from tests.engine.conftest import said


def test_contexts_make_room_for_requests(db, engines, alone, rng):
    documents = [rng.integers(3, 256, 300) for _ in range(3)]
    for document in documents:
        db.import_context(document, progress=False)
    requests = [aj.Request(rng.integers(3, 256, 200), 10) for _ in range(4)]
    expected = [alone(each) for each in requests]
    engine = engines(slots=4)
    assert [said(result) for result in engine.run(requests)] == expected
    again = engine.submit(aj.Request([*documents[0], 5], 3)).result(60)
    assert again.cached_tokens == 300, "read from the store again"


def test_one_that_surely_does_not_fit_evicts_nobody(db, engines, rng):
    """It waits for pages that a session holds; the context beside it stays in memory."""
    document = rng.integers(3, 256, 100)
    context = db.import_context(document, progress=False)
    session, _ = db.create_session([*document, 3])
    session.close()
    assert context.resident is not None
    held = PagedSequence()
    db.pool.reserve(held, db.pool.free_tokens - 16)
    running = engines().submit(aj.Request(rng.integers(3, 256, 300), 3))
    with pytest.raises(TimeoutError):
        running.result(4 * loop.RETRY)
    assert context.resident is not None
    db.pool.release(held)
    assert running.result(60).finish_reason == "length"


def test_stats_count_every_page_once(db, engines, rng):
    document = rng.integers(3, 256, 100)
    db.import_context(document, progress=False)
    session, rest = db.create_session(rng.integers(3, 256, 50))
    session.prefill(rest)
    engine = engines()
    running = [engine.submit(aj.Request([*document, i], 200)) for i in (5, 6)]
    for each in running:
        next(iter(each))
    stats = engine.stats()
    parts = stats.pages_free, stats.pages_requests, stats.pages_contexts, stats.pages_others
    assert sum(parts) == stats.pages == 64
    assert stats.pages_others == 4
    assert stats.pages_requests >= 6 + 2 * 2
    assert (stats.running, stats.prefilling, stats.waiting) == (2, 0, 0)
    assert stats.tokens_reused == 200
    for each in running:
        each.cancel()
        each.result(60)
    session.close()


def test_graphs_run_each_alone(db, engines, alone, rng):
    """No two sequences' graphs are of one size."""
    document = rng.integers(3, 256, 200)
    context = db.import_context(document, progress=False)
    graph = aj.Graph()
    db.build_index(context, graph, progress=False)
    plan = aj.Plan(aj.DIPR(beta=4.0, window=aj.Window(2, 16)), graph)
    requests = [aj.Request([*document, i], 8, plan) for i in (5, 6)]
    requests.append(aj.Request(np.asarray([*document, 7]), 8))
    expected = [alone(each) for each in requests]
    assert [said(result) for result in engines().run(requests)] == expected
    with pytest.raises(aj.AlayaError, match="graph"):
        engines().submit(aj.Request([4, 5, 6], 8, plan)).result(60)


def test_auto_is_resolved_when_it_comes_in(db, engines, rng):
    request = aj.Request(rng.integers(3, 256, 60), 6, aj.Auto(recovery=0.9))
    first, second = engines().run([request, request])
    assert first.ids == second.ids
