"""Log-probabilities of prompts and completions, against the model alone."""

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError


@pytest.fixture
def expected(all_logits):
    """Log-probabilities of a sequence's tokens, and the likeliest in each place."""

    def of(ids, model=None):
        logits = all_logits(ids).astype(np.float64) if model is None else all_logits(ids, model)
        logits = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return [logits[i, ids[i + 1]] for i in range(len(ids) - 1)], logits[:-1].argmax(1)

    return of


@pytest.mark.parametrize("length", [1, 2, 9, 63, 64, 65, 150])
def test_of_each_token_of_a_prompt(engines, rng, expected, length):
    prompt = rng.integers(3, 256, length)
    result = (
        engines(chunk=64)
        .submit(aj.Request(prompt, 0, sampling=aj.Greedy(logprobs=3), prompt_logprobs=True))
        .result(60)
    )
    want, likeliest = expected(prompt)
    assert result.prompt_logprobs[0] is None
    assert list(result.prompt_logprobs[1:]) == pytest.approx(want, abs=3e-4)
    assert result.prompt_alternatives[0] is None
    assert [best[0][0] for best in result.prompt_alternatives[1:]] == list(likeliest)
    assert all(len(best) == 3 for best in result.prompt_alternatives[1:])
    assert (result.ids, result.finish_reason) == ((), "length")
    assert result.timing.first_token_s is None


def test_what_is_known_of_a_prompt_changes_nothing(db, engines, rng, expected):
    """Asked for before and after others that begin alike, beside them, and behind a context."""
    prompt = rng.integers(3, 256, 90)
    engine = engines()
    asks = aj.Request(prompt, 4, prompt_logprobs=True)
    plain = aj.Request([*prompt[:80], 9], 30)
    running = [engine.submit(each) for each in (asks, plain, asks, plain, asks)]
    db.import_context(prompt, progress=False)
    running.append(engine.submit(asks))
    results = [each.result(60) for each in running]
    want, _ = expected(prompt)
    for result in (results[0], results[2], results[4], results[5]):
        assert list(result.prompt_logprobs[1:]) == pytest.approx(want, abs=3e-4)
        assert result.cached_tokens == 0
        assert len(result.ids) == 4
    assert results[1].prompt_logprobs is None
    assert results[3].cached_tokens == 80


def test_completions_behind_one_prompt_read_it_once(db, engines, rng, expected):
    prompt = rng.integers(3, 256, 100)
    endings = [rng.integers(3, 256, n) for n in (1, 5, 12, 20)]
    engine = engines()
    scores = aj.score(engine, [prompt] * 4, endings)
    for ending, one in zip(endings, scores, strict=True):
        want = expected(np.concatenate([prompt, ending]))[0][99:]
        assert one.logprob == pytest.approx(sum(want), abs=2e-3)
        assert [id for id, _ in one.tokens] == ending.tolist()
        assert [logprob for _, logprob in one.tokens] == pytest.approx(want, abs=3e-4)
        assert not one.is_greedy
    assert engine.stats().tokens_prefilled == 100 + 1 + sum(4 + n for n in (5, 12, 20))


def test_greedy_completions_are_known(db, engines, greedy, rng):
    prompt = rng.integers(3, 256, 30)
    best = greedy(prompt, 6)
    wrong = [*best[:5], best[5] ^ 1]
    scores = aj.score(db, [prompt] * 2, [best, wrong])
    assert [score.is_greedy for score in scores] == [True, False]
    assert db.pool.free_tokens == 1024, "an engine of its own is gone"


def test_a_plan_answers_the_completion_as_if_it_were_decoded(db, engines, rng):
    prompt = rng.integers(3, 256, 60)
    window = aj.Window(sink=2, recent=6)
    session, rest = db.create_session(prompt)
    with session:
        tokens = list(aj.generate(session, rest, max_new_tokens=8, attention=window))
    (score,) = aj.score(db, [prompt], [[t.id for t in tokens]], attention=window)
    assert [logprob for _, logprob in score.tokens] == pytest.approx(
        [t.logprob for t in tokens], abs=3e-4
    )
    (full,) = aj.score(db, [prompt], [[t.id for t in tokens]])
    assert full.tokens[0] == pytest.approx(score.tokens[0], abs=3e-4)
    assert full.logprob != pytest.approx(score.logprob, abs=0.1)


def test_texts(db, tiny_model, expected):
    (text,) = aj.score(db, ["Say it: "], ["now"])
    (ids,) = aj.score(db, [tiny_model.encode("Say it: ")], [tiny_model.encode("now")])
    (mixed,) = aj.score(db, [tiny_model.encode("Say it: ")], ["now"])
    assert text == ids == mixed
    assert text.logprob == pytest.approx(sum(expected(tiny_model.encode("Say it: now"))[0][7:]))


def test_what_score_cannot_take(db):
    for args, match in (
        ((db, ["a"], []), "one for each"),
        ((db, ["a"], [""]), "1 tokens and the completion 0"),
        ((db, ["a"], [[]]), "at least one"),
        (("db", ["a"], ["b"]), "DB or an Engine"),
        ((db, "ab", ["a", "b"]), "prompts is one text"),
        ((db, ["a", "b"], "ab"), "completions is one text"),
    ):
        with pytest.raises(RequestError, match=match):
            aj.score(*args)
