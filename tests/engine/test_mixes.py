"""What a request gets is what it would get alone, whoever runs beside it."""

import dataclasses
import string

import numpy as np
import pytest

import alaya_jax as aj
from tests.engine.conftest import said

WINDOW = aj.Window(sink=2, recent=6)
PLANS = (
    (None, None),
    (aj.DIPR(beta=3.0, window=WINDOW), None),
    (aj.DIPR(beta=1.0, window=WINDOW), aj.DIPR(beta=5.0, window=WINDOW)),
    (WINDOW, None),
    ((aj.Full(), WINDOW), WINDOW),
)


SENTENCE = aj.Constraint(regex=r"([a-z]{1,7} ){2,5}[a-z]+\.")


def sampling(random: np.random.Generator, most: int) -> aj.Sampling:
    """One of many: greedy or not, with filters, penalties, ends, alternatives, a constraint and a
    least of tokens, or without.
    """
    settings = {
        "temperature": random.choice([0.0, 0.0, 0.8, 1.3]),
        "top_p": random.choice([1.0, 0.9]),
        "top_k": random.choice([0, 7]),
        "min_p": random.choice([0.0, 0.05]),
        "frequency_penalty": random.choice([0.0, 0.0, 0.7]),
        "repetition_penalty": random.choice([1.0, 1.0, 1.3]),
        "seed": random.integers(0, 99),
        "logprobs": random.choice([0, 0, 3]),
    }
    bias = {int(i): 2.0 for i in random.integers(40, 120, 3)} if random.random() < 0.2 else {}
    letters = random.choice(list(string.ascii_letters), 2)
    stop = tuple(map(str, letters)) if random.random() < 0.3 else ()
    ends = tuple(map(int, random.integers(40, 120, 2))) if random.random() < 0.3 else ()
    numbers = {name: value.item() for name, value in settings.items()}
    kept = SENTENCE if random.random() < 0.2 else None
    least = int(random.integers(most + 1)) if random.random() < 0.1 else 0
    more = {"constraint": kept, "min_tokens": least}
    return aj.Sampling(**numbers, logit_bias=bias, stop=stop, stop_ids=ends, **more)


def request(random: np.random.Generator, beginnings: list[np.ndarray]) -> aj.Request:
    """A prompt, often with a beginning that others have too."""
    beginning = beginnings[random.integers(len(beginnings))]
    own = random.integers(3, 256, random.integers(1, 70))
    prompt = np.concatenate([beginning[: random.integers(len(beginning) + 1)], own])
    attention, prefill = PLANS[random.choice(len(PLANS), p=[0.5, 0.2, 0.1, 0.1, 0.1])]
    most = int(random.integers(1, 40))
    return aj.Request(prompt, most, attention, prefill, sampling(random, most))


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10))]
)
def test_thirty_mixes(db, engines, alone, seed):
    """Three of each seed, over a pool that is too small for them: some lose their pages and come
    again, some are cancelled in the middle, and no page is lost.
    """
    random = np.random.default_rng(seed)
    engine = engines(slots=6, chunk=64)
    for _ in range(3):
        beginnings = [random.integers(3, 256, 90) for _ in range(2)]
        requests = [request(random, beginnings) for _ in range(8)]
        cuts = [int(random.integers(1, 30)) if random.random() < 0.25 else None for _ in requests]
        running = []
        for each, cut in zip(requests, cuts, strict=True):
            count = iter(range(1, 99))
            after = None if cut is None else lambda _, count=count, cut=cut: next(count) == cut
            running.append(engine.submit(each, on_token=after))
        for each, cut, ended in zip(requests, cuts, running, strict=True):
            result, expected = ended.result(60), alone(each)
            if result.finish_reason == "cancelled":
                assert len(result.tokens) == cut
                assert result.ids == expected[0][:cut]
                assert expected[1].startswith(result.text)
            else:
                assert said(result) == expected
            wanted = each.sampling.logprobs
            assert all(len(token.alternatives) == wanted for token in result.tokens)


def test_a_full_batch_of_equal_requests(db, engines, alone):
    """Sixteen that begin alike: the prompt is read once, and all say the same."""
    prompt = np.arange(3, 99)
    each = aj.Request(prompt, 12)
    engine = engines(slots=16)
    results = list(engine.run([each] * 16))
    assert {said(result) for result in results} == {alone(each)}
    assert sorted(result.cached_tokens for result in results) == [0] + [80] * 15
    stats = engine.stats()
    assert stats.tokens_prefilled == 96 + 15 * 16
    assert stats.tokens_reused == 15 * 80
    assert stats.preemptions == 0


def test_log_probabilities_are_those_alone(db, engines, rng):
    each = aj.Request(rng.integers(3, 256, 40), 8, sampling=aj.Greedy(logprobs=3))
    others = [
        aj.Request(rng.integers(3, 256, 30), 20, sampling=s)
        for s in (aj.Greedy(), aj.Sampling(seed=3), aj.Greedy(presence_penalty=1.0))
    ]
    session, rest = db.create_session(each.prompt)
    with session:
        expected = list(aj.generate(session, rest, max_new_tokens=8, sampling=each.sampling))
    *_, result = engines().run([*others, each])
    for token, want in zip(result.tokens, expected, strict=True):
        assert token.id == want.id
        assert token.logprob == pytest.approx(want.logprob, abs=2e-5)
        assert [i for i, _ in token.alternatives] == [i for i, _ in want.alternatives]


def test_keys_read_is_what_the_plan_left(db, engines, rng):
    prompt = rng.integers(3, 256, 50)
    full, narrow = engines().run([aj.Request(prompt, 11), aj.Request(prompt, 11, WINDOW)])
    assert full.keys_read == pytest.approx(np.mean(range(51, 61)))
    assert narrow.keys_read == 8


def test_a_stored_context_is_reused(open_db, engines, alone):
    db = open_db(path="stored")
    document = np.arange(3, 120)
    db.import_context(document, progress=False)
    each = aj.Request(np.concatenate([document, [7, 9, 11]]), 6)
    expected = alone(each, db)
    engine = engines(db)
    first, second = engine.run([each, each])
    assert said(first) == said(second) == expected
    assert first.cached_tokens == 117
    assert engine.stats().pages_contexts == 8


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 64])
def test_a_prompt_that_is_all_there(db, engines, alone, length):
    """Stored as it is, and of a request that runs: one token is always computed."""
    prompt = np.arange(3, 3 + length)
    db.import_context(prompt, progress=False)
    each = aj.Request(prompt, 20)
    for result in engines().run([each] * 3):
        assert said(result) == alone(each)
        assert result.cached_tokens == length - 1


def test_keys_of_another_way_are_not_taken(db, engines, alone, rng):
    """A prefill that leaves keys out makes other keys of the same tokens."""
    prompt = rng.integers(3, 256, 80)
    exact, narrow = aj.Request(prompt, 25), aj.Request(prompt, 25, prefill=WINDOW)
    assert alone(exact) != alone(narrow)
    for pair in ((exact, narrow), (narrow, exact)):
        for result, each in zip(engines().run(pair), pair, strict=True):
            assert said(result) == alone(each)
            assert result.cached_tokens == 0
    again, twice = engines().run([narrow, dataclasses.replace(narrow, max_new_tokens=3)])
    assert (again.cached_tokens, twice.cached_tokens) == (0, 64)
