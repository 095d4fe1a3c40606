"""Many requests over a small pool, from several threads, beside everything else."""

import dataclasses
import threading
import time

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import CacheFullError
from tests.engine.conftest import said
from tests.engine.test_mixes import request

KINDS = 40
THREADS = 4


@pytest.mark.slow
@pytest.mark.parametrize(("store_dtype", "count"), [(None, 120), ("int8", 60)])
def test_many_requests(open_db, engines, alone, store_dtype, count):
    """Random cancels, handles that are dropped, contexts that come and go and sessions beside: what
    ends by itself says what it says alone, and no page is lost.
    """
    random = np.random.default_rng(11)
    beginnings = [random.integers(3, 256, 90) for _ in range(3)]
    kinds = [request(random, beginnings) for _ in range(KINDS)]
    if store_dtype is None:  # a prefill that leaves keys out says others behind a stored beginning
        kinds = [dataclasses.replace(each, prefill=None) for each in kinds]
    apart = open_db(path="apart")
    expected = [alone(each, apart) for each in kinds]
    # Of contexts in 8 bits other texts come: they are stored for nobody's beginning.
    stored = beginnings if store_dtype is None else [random.integers(3, 256, 90)]
    db = open_db(path="soak", pages=49, store_dtype=store_dtype)
    engine = engines(db, slots=6, chunk=64)
    problems: list[BaseException] = []
    compared = []

    def client(seed: int) -> None:
        own = np.random.default_rng(seed)
        running = []
        for _ in range(count // THREADS):
            kind = int(own.integers(KINDS))
            running.append((kind, engine.submit(kinds[kind])))
            what = own.random()
            if what < 0.1:
                running.pop()  # dropped
            elif what < 0.2:
                running[-1][1].cancel()
            elif what < 0.3:
                next(iter(running[-1][1]), None)  # abandoned in the middle
                running[-1][1].cancel()
            elif what < 0.4:
                time.sleep(0.01)
            while len(running) > own.integers(1, 12):
                check(*running.pop(0))
        for each in running:
            check(*each)

    def check(kind: int, running) -> None:
        result = running.result(120)
        if result.finish_reason != "cancelled":
            assert said(result) == expected[kind]
            compared.append(kind)
        else:
            assert result.ids == expected[kind][0][: len(result.ids)]

    def beside(seed: int) -> None:
        own = np.random.default_rng(seed)
        while not over.is_set():
            try:
                row = stored[own.integers(len(stored))][: own.integers(20, 90)]
                context = db.import_context(row, progress=False)
                if own.random() < 0.5:
                    db.remove(context)
                session, rest = db.create_session(kinds[0].prompt, reuse="exact")
                with session:
                    for _ in aj.generate(session, rest, max_new_tokens=5):
                        pass
            except CacheFullError:
                time.sleep(0.01)

    def guarded(work, seed) -> None:
        try:
            work(seed)
        except BaseException as error:
            problems.append(error)

    over = threading.Event()
    threads = [threading.Thread(target=guarded, args=(client, i)) for i in range(THREADS)]
    aside = threading.Thread(target=guarded, args=(beside, 99))
    for thread in (*threads, aside):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    aside.join()
    for problem in problems:
        raise problem
    assert len(compared) > count / 2
