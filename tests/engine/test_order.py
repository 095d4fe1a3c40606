"""Who is let in, who waits for whom, and who loses its pages."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import alaya_jax as aj
from alaya_jax.cache.pool import PagedSequence
from alaya_jax.errors import CacheFullError, QueueFullError, RequestError
from alaya_jax.runtime.waiting import PASSES
from tests.engine.conftest import said


@pytest.fixture
def leave(db: Any) -> Iterator[Callable[[int], PagedSequence]]:
    """Takes pages of the pool until only so many are free."""
    held: list[PagedSequence] = []

    def take(free: int) -> PagedSequence:
        held.append(PagedSequence())
        db.pool.reserve(held[-1], db.pool.free_tokens - 16 * free)
        return held[-1]

    yield take
    for sequence in held:
        db.pool.release(sequence)


def together(engine: aj.Engine) -> Any:
    """Around requests that the engine is to see all at once."""
    return engine._loop.together()


def admitted(running: Any) -> float:
    return running._run.admitted


def test_who_loses_its_pages_says_the_same(db, engines, alone, rng, leave):
    """Room for one and a half: the one that came in last leaves, again and again."""
    requests = [
        aj.Request(rng.integers(3, 256, 30), 60, sampling=sampling, attention=attention)
        for sampling in (aj.Greedy(), aj.Sampling(temperature=0.8, seed=7, frequency_penalty=0.3))
        for attention in (None, aj.DIPR(beta=2.0, window=aj.Window(2, 6)))
    ]
    expected = [alone(each) for each in requests]
    held = leave(9)
    engine = engines(slots=4)
    running = [engine.submit(each) for each in requests]
    assert [said(each.result(60)) for each in running] == expected
    stats = engine.stats()
    assert stats.preemptions >= 2
    assert stats.tokens_prefilled > sum(len(r.prompt) for r in requests), "they were read again"
    assert stats.pages_others == len(held.pages)
    db.pool.release(held)


def test_the_first_never_leaves(db, engines, rng, leave):
    held = leave(9)
    engine = engines(slots=4)
    with together(engine):
        running = [engine.submit(aj.Request(rng.integers(3, 256, 30), 60)) for _ in range(3)]
    results = [each.result(60) for each in running]
    assert engine.stats().preemptions > 0
    times = [result.timing.total_s for result in results]
    assert times == sorted(times), "they ended in the order in which they came"
    db.pool.release(held)


def test_small_ones_pass_a_large_one_a_few_times_only(db, engines, rng, leave):
    """The first holds pages for long; the large one does not fit beside it, small ones do."""
    held = leave(16)
    engine = engines(slots=3)
    with together(engine):
        first = engine.submit(aj.Request(rng.integers(3, 256, 20), 150))
        large = engine.submit(aj.Request(rng.integers(3, 256, 200), 4))
        small = [engine.submit(aj.Request(rng.integers(3, 256, 5), 2)) for _ in range(2 * PASSES)]
    for running in (first, large, *small):
        running.result(60)
    before = sum(admitted(each) < admitted(large) for each in small)
    assert before == PASSES
    db.pool.release(held)


def test_who_shares_most_goes_first(db, engines, rng):
    prompt = rng.integers(3, 256, 100)
    other = rng.integers(3, 256, 100)
    engine = engines(slots=2)
    running = engine.submit(aj.Request(prompt, 200))
    next(iter(running))
    with together(engine):
        last = engine.submit(aj.Request(other, 30))
        some = engine.submit(aj.Request([*prompt[:40], *other], 2))
        most = engine.submit(aj.Request([*prompt, 5], 2))
    for each in (last, some, most):
        each.result(60)
    assert admitted(most) < admitted(some) < admitted(last)
    running.cancel()
    assert running.result(60).finish_reason == "cancelled"


def test_a_prompt_under_way_is_waited_for(db, engines, alone, rng):
    """Read in four chunks; whoever begins alike comes in behind the last, and reads its own end."""
    beginning = rng.integers(3, 256, 250)
    requests = [aj.Request([*beginning, 7, i], 4) for i in range(3, 7)]
    expected = [alone(each) for each in requests]
    engine = engines(slots=8, chunk=64)
    with together(engine):
        running = [engine.submit(each) for each in requests]
        beside = engine.submit(aj.Request(rng.integers(3, 256, 20), 4))
    assert [said(each.result(60)) for each in running] == expected
    beside.result(60)
    assert engine.stats().tokens_prefilled == 252 + 3 * (252 - 240) + 20
    assert max(map(admitted, running[:1])) < admitted(beside) < min(map(admitted, running[1:]))


def test_what_never_fits_is_refused_at_once(db, engines, open_db, tiny_model):
    engine = engines()
    for settings, error, match in (
        ({"prompt": [3] * 500, "max_new_tokens": 14}, RequestError, "500 .* 14 .*512"),
        ({"prompt": []}, RequestError, "no tokens"),
        ({"prompt": [999]}, RequestError, "vocabulary"),
        ({"prompt": [3], "attention": (aj.Full(),)}, RequestError, "2 layers"),
        ({"prompt": [3], "attention": "full"}, RequestError, "attention"),
        (
            {"prompt": [3], "attention": aj.Plan(aj.Window(), tier="host")},
            RequestError,
            "aj.generate",
        ),
        ({"prompt": [3], "sampling": aj.Greedy(stop_ids=[999])}, RequestError, "vocabulary"),
    ):
        with pytest.raises(error, match=match):
            engine.submit(aj.Request(**settings))
    for settings, match in (
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 2.5}, "at least 1"),
        ({"sampling": 0.7}, r"aj\.Sampling"),
        ({"prompt_logprobs": 3}, "True or False"),
    ):
        with pytest.raises(RequestError, match=match):
            aj.Request([3], **settings)
    with pytest.raises(RequestError, match=r"aj\.Request"):
        engine.submit([3])
    for settings in ({"slots": 0}, {"chunk": 1.5}, {"waiting": True}):
        with pytest.raises(RequestError, match="at least 1"):
            aj.Engine(db, **settings)
    with pytest.raises(RequestError, match="takes a database"):
        aj.Engine(tiny_model)
    assert engine.submit(aj.Request([3] * 500, 13)).result(60).finish_reason == "length"
    small = open_db(path="small", pages=9, indexes="64B")
    with aj.Engine(small) as engine:
        with pytest.raises(CacheFullError, match=r"100 .* 40 .*139 .*holds 128.*Budget.*bytes"):
            engine.submit(aj.Request([3] * 100, 40))
        with pytest.raises(CacheFullError, match="Sketch"):
            engine.submit(aj.Request([3], 2, aj.Plan(aj.DIPR(beta=1.0), aj.Sketch())))
        assert engine.stats().requests == 0


def test_a_full_queue_says_so(db, engines, rng):
    engine = engines(slots=1, waiting=2)
    with together(engine):
        running = [engine.submit(aj.Request(rng.integers(3, 256, 5), 3)) for _ in range(2)]
        with pytest.raises(QueueFullError, match=r"2 requests .*waiting=2"):
            engine.submit(aj.Request([3]))
    for each in running:
        each.result(60)
    # `run` waits for its own, and takes as many as there are.
    requests = [aj.Request(rng.integers(3, 256, 5), 1 + i % 3) for i in range(9)]
    results = list(engine.run(iter(requests)))
    assert [len(result.ids) for result in results] == [r.max_new_tokens for r in requests]
    assert [result.index for result in results] == list(range(2, 11))


def test_a_request_waits_for_pages_of_others(db, engines, rng, leave):
    held = leave(2)
    running = engines().submit(aj.Request(rng.integers(3, 256, 50), 3))
    with pytest.raises(TimeoutError, match="has not ended after"):
        running.result(0.3)
    db.pool.release(held)
    assert running.result(60).finish_reason == "length"


def test_what_cannot_fit_beside_pinned_contexts_fails(db, engines, rng):
    """Nobody who could give pages back has them, so it does not wait for ever."""
    for _ in range(2):
        context = db.import_context(rng.integers(3, 256, 400), progress=False)
        session, _ = db.create_session([*context.tokens, 3])
        session.close()
        context.pin()
    with pytest.raises(CacheFullError, match="free"):
        engines().submit(aj.Request(rng.integers(3, 256, 300), 5)).result(60)
    for context in db.contexts:
        context.unpin()


@pytest.mark.slow
def test_nothing_is_compiled_once_all_kinds_were_there(db, engines, rng):
    kinds = [
        aj.Greedy(),
        aj.Sampling(temperature=0.7),
        aj.Sampling(top_p=0.9, seed=3),
        aj.Greedy(logprobs=2, repetition_penalty=1.2),
    ]

    def requests(count: int, kinds: list[aj.Sampling]) -> list[aj.Request]:
        lengths = rng.integers(1, 100, count)
        return [
            aj.Request(rng.integers(3, 256, n), 3 + 3 * i, sampling=kinds[i % len(kinds)])
            for i, n in enumerate(lengths)
        ]

    engine = engines(slots=16)
    for kind in kinds:
        list(engine.run(requests(9, [kind])))
    list(engine.run([aj.Request(rng.integers(3, 256, n), 2) for n in (5, 40, 90)]))
    before = aj.compilations()
    for count in (1, 2, 5, 14):
        results = list(engine.run(requests(count, kinds)))
        assert [result.programs for result in results] == [0] * count
    assert (aj.compilations() - before).programs == 0


def test_programs_are_told_of_who_waited_for_them(db, engines, rng):
    import jax

    jax.clear_caches()
    engine = engines()
    first = engine.submit(aj.Request(rng.integers(3, 256, 5), 3)).result(60)
    again = engine.submit(aj.Request(rng.integers(3, 256, 5), 3)).result(60)
    assert first.programs >= 3
    assert again.programs == 0
    assert engine.stats().programs >= first.programs


def test_times(db, engines, rng):
    engine = engines(slots=1)
    began = time.perf_counter()
    with together(engine):  # each counts from when it was submitted
        running = [engine.submit(aj.Request(rng.integers(3, 256, 5), 8)) for _ in range(2)]
    first, second = (each.result(60) for each in running)
    took = time.perf_counter() - began
    for timing in (first.timing, second.timing):
        assert 0 <= timing.queued_s <= timing.first_token_s
        assert timing.first_token_s + timing.decode_s <= timing.total_s <= took
    assert second.timing.queued_s >= first.timing.first_token_s
