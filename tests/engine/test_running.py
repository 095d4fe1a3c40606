"""A request under way: iterated, awaited, cancelled, dropped, failed, closed."""

import asyncio
import dataclasses
import gc
import pickle
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import EngineClosedError, RequestError
from tests.engine.conftest import said

LONG = 300


@pytest.fixture
def prompt(rng):
    return rng.integers(3, 256, 40)


def until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_tokens_come_one_by_one(db, engines, alone, prompt):
    each = aj.Request(prompt, 12)
    running = engines().submit(each)
    tokens = list(running)
    assert list(running) == tokens, "they can be read again"
    result = running.result()
    assert result.tokens == tuple(tokens)
    assert said(result) == alone(each)
    assert running.done()
    assert running.tokens == tokens
    assert running.prompt_ids.tolist() == prompt.tolist()
    assert (result.index, result.prompt_tokens) == (running.index, len(prompt)) == (0, 40)
    assert repr(running) == "Running(request 0, 12 tokens, length)"


def test_text_and_messages(engines, db, tiny_model):
    engine = engines()
    text, ids = engine.run([aj.Request("Hello", 3), aj.Request(tiny_model.encode("Hello"), 3)])
    assert said(text) == said(ids)
    with pytest.raises(aj.AlayaError, match="chat template"):
        engine.submit(aj.Request([{"role": "user", "content": "Hello"}], 3))


def test_coroutines(engines, alone, prompt):
    """Several at once: iterated, awaited, and one that has ended before anybody looks."""
    requests = [aj.Request(prompt[i:], 9 + i) for i in range(3)]
    expected = [alone(each) for each in requests]
    engine = engines()

    async def tokens(running):
        return [token async for token in running]

    async def main():
        running = [engine.submit(each) for each in requests]
        come = await asyncio.gather(*map(tokens, running))
        results = [await each for each in running]
        assert [tuple(tokens) for tokens in come] == [result.tokens for result in results]
        assert [said(result) for result in results] == expected
        return running

    for running in asyncio.run(main()):
        assert running.done()


def test_a_coroutine_that_goes_away_leaves_no_listener(engines, prompt):
    engine = engines()

    async def main():
        running = engine.submit(aj.Request(prompt, LONG))
        task = asyncio.create_task(running._ended())
        async for _ in running:
            break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return running

    running = asyncio.run(main())
    assert not running.done(), "who waits for it does not own it"
    running.cancel()
    assert running.result(30).finish_reason == "cancelled"


def test_cancel(db, engines, alone, prompt):
    each = aj.Request(prompt, LONG)
    engine = engines(slots=1)
    running, waiting = engine.submit(each), engine.submit(each)
    waiting.cancel()
    assert waiting.result(30).ids == ()
    came = iter(running)
    for _ in range(5):
        next(came)
    running.cancel()
    result = running.result(30)
    assert result.finish_reason == "cancelled"
    assert result.ids == alone(each)[0][: len(result.ids)]
    assert 5 <= len(result.ids) < LONG
    running.cancel()
    assert running.result() is result
    assert list(came) == list(result.tokens[5:])
    until(lambda: db.pool.free_tokens == 1024)


def test_a_handle_that_is_dropped_cancels(db, engines, prompt):
    engine = engines()
    running = engine.submit(aj.Request(prompt, LONG))
    next(iter(running))
    del running
    gc.collect()
    until(lambda: engine.stats().finished == 1)
    until(lambda: db.pool.free_tokens == 1024)
    assert engine.stats().tokens_generated < LONG


def test_one_with_a_callback_goes_on(engines, prompt):
    came = []
    engine = engines()
    engine.submit(aj.Request(prompt, 20), came.append)
    gc.collect()
    until(lambda: len(came) == 20)
    until(lambda: engine.stats().finished == 1)


def test_a_callback_ends_its_request_alone(engines, alone, prompt):
    engine = engines()

    def fails(token):
        raise KeyError("mine")

    def leaves(token):
        sys.exit("mine too")

    good = engine.submit(aj.Request(prompt, 30))
    bad = engine.submit(aj.Request(prompt, 30), fails)
    left = engine.submit(aj.Request(prompt, 30), leaves)
    with pytest.raises(SystemExit, match="mine too"):
        left.result(30)
    ends = engine.submit(aj.Request(prompt, 30), lambda token: True)
    with pytest.raises(KeyError, match="mine"):
        bad.result(30)
    with pytest.raises(KeyError, match="mine"):
        list(bad)
    assert "failed: KeyError" in repr(bad)
    assert len(ends.result(30).tokens) == 1
    assert said(good.result(30)) == alone(aj.Request(prompt, 30))
    assert engine.stats().failed == 2


def test_a_callback_submits_and_does_not_wait(engines, alone, prompt):
    """The engine would wait for itself."""
    engine = engines()
    more = []

    async def awaits():
        await more[-1]

    def submits(token):
        more.append(engine.submit(aj.Request(prompt, 5)))
        for waits in (more[-1].result, lambda: list(more[-1]), lambda: asyncio.run(awaits())):
            with pytest.raises(RequestError, match="own thread"):
                waits()

    first = engine.submit(aj.Request(prompt, 3), submits)
    assert len(first.result(30).ids) == 3
    assert [said(each.result(30)) for each in more] == [alone(aj.Request(prompt, 5))] * 3
    engine.submit(aj.Request(prompt, 3), lambda _: first.result() and None).result(30)


def test_logits_that_are_not_finite_fail_one_request(open_db, engines, alone, tiny_model, rng):
    poison = 200
    embedding = tiny_model.params["embed"]["embedding"].at[poison].set(jnp.nan)
    params = {**tiny_model.params, "embed": {"embedding": embedding}}
    db = open_db(dataclasses.replace(tiny_model, params=params), "poisoned")
    healthy = [aj.Request(rng.integers(3, 100, 30), 20) for _ in range(3)]
    expected = [alone(each, db) for each in healthy]
    engine = engines(db)
    sick = engine.submit(aj.Request([5, 6, poison], 20))
    with pytest.raises(aj.AlayaError, match=r"request 0 are not finite after 3 .*float32"):
        sick.result(60)
    running = [engine.submit(each) for each in healthy]
    sick = engine.submit(aj.Request([5, 6, poison], 20))
    assert [said(each.result(60)) for each in running] == expected
    with pytest.raises(aj.AlayaError, match="not finite"):
        sick.result(60)


def test_a_closed_engine_ends_everybody(db, engines, prompt):
    engine = engines(slots=2)
    running = [engine.submit(aj.Request(prompt, LONG)) for _ in range(5)]
    next(iter(running[0]))
    engine.close()
    for each in running:
        with pytest.raises(EngineClosedError, match=r"open another with aj\.Engine"):
            each.result(5)
    with pytest.raises(EngineClosedError):
        engine.submit(aj.Request(prompt))
    engine.close()
    assert db.pool.free_tokens == 1024
    assert repr(engine) == "Engine(closed)"
    with aj.Engine(db) as other:
        assert other.submit(aj.Request(prompt, 2)).result(30).finish_reason == "length"
    assert "Engine(tiny, 0 running" in repr(engines())


def test_an_engine_that_breaks_says_why(db, prompt, monkeypatch):
    engine = aj.Engine(db)

    def broken():
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(engine._loop, "_admit", broken)
    with pytest.raises(EngineClosedError, match="a fault of ours"):
        engine.submit(aj.Request(prompt, 5)).result(30)
    engine.close()


def test_a_dropped_engine_ends_its_thread(db, prompt):
    before = set(threading.enumerate())
    engine = aj.Engine(db)
    running = engine.submit(aj.Request(prompt, LONG))
    next(iter(running))
    (thread,) = (t for t in threading.enumerate() if t not in before and t.name == "alaya engine")
    del engine
    gc.collect()
    with pytest.raises(EngineClosedError):
        running.result(30)
    until(lambda: not thread.is_alive())
    assert db.pool.free_tokens == 1024


def test_closing_the_database_closes_its_engines(open_db, prompt):
    db = open_db(path="closed")
    engine = aj.Engine(db)
    running = engine.submit(aj.Request(prompt, LONG))
    next(iter(running))
    db.close()
    with pytest.raises(EngineClosedError):
        running.result(30)
    with pytest.raises(EngineClosedError):
        engine.submit(aj.Request(prompt, 1))
    assert db.pool.free_tokens == 1024
    engine.close()
    db.close()


def test_submit_waits_for_no_program(db, engines, prompt):
    """The pool's lock is held while programs are compiled."""
    engine = engines()
    held, done = threading.Event(), threading.Event()

    def holds():
        with db.pool.lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=holds)
    thread.start()
    held.wait(30)
    running = [engine.submit(aj.Request(p, 3)) for p in (prompt, "text")]
    running[0].cancel()
    assert thread.is_alive(), "it waited for the lock"
    done.set()
    thread.join()
    for each in running:
        each.result(30)


@pytest.mark.slow
def test_a_process_may_end_in_the_middle(tmp_path):
    """A request under way, and nobody closes anything."""
    code = """
import numpy as np, jax
import alaya_jax as aj
from alaya_jax import configs
from alaya_jax.models import LlamaConfig, llama
config = LlamaConfig.from_hf(configs.load("llama-tiny"))
params = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), llama.abstract_params(config))
db = aj.DB("db", aj.Model(config, params), aj.Budget.for_pages(aj.Model(config, params), 65))
engine = aj.Engine(db)
running = engine.submit(aj.Request([3, 4, 5], 400, sampling=aj.Greedy(ignore_eos=True)))
next(iter(running))
print("there")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "there\n"), done.stderr


def test_leaving_run_early_cancels_the_rest(db, engines, prompt):
    engine = engines(slots=2)
    results = engine.run([aj.Request(prompt, n) for n in (2, LONG, LONG, LONG)])
    assert len(next(results).ids) == 2
    results.close()
    until(lambda: engine.stats().finished == 4)
    until(lambda: db.pool.free_tokens == 1024)


def test_neither_can_be_pickled(engines, prompt):
    engine = engines()
    running = engine.submit(aj.Request(prompt, 1))
    for one, match in ((engine, "another engine there"), (running, "cannot be pickled")):
        with pytest.raises(RequestError, match=match):
            pickle.dumps(one)


def test_threads_share_an_engine_and_its_database(db, engines, alone):
    """Two submit, while a third stores contexts, reads them and generates in sessions."""
    random = np.random.default_rng(11)
    lists = [[aj.Request(random.integers(3, 256, 20 + i), 15) for i in range(6)] for _ in range(2)]
    expected = [[alone(each) for each in requests] for requests in lists]
    documents = [random.integers(3, 256, 70) for _ in range(3)]
    asked = [aj.Request([*document, 5], 8) for document in documents]
    answers = [alone(each) for each in asked]
    engine = engines(slots=4)
    found, errors = [None, None, []], []

    def submits(i):
        found[i] = [said(result) for result in engine.run(lists[i])]

    def beside(i):
        for document, each in zip(documents, asked, strict=True):
            db.import_context(document, progress=False)
            found[i].append(alone(each))

    def run(function, i):
        try:
            function(i)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=args)
        for args in ((submits, 0), (submits, 1), (beside, 2))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert found == [*expected, answers]
