"""Scores, whole texts and answers as lm-eval asks them, without lm-eval."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError
from alaya_jax.evaluation.answering import Answering, AnswerSettings

GOLDENS = json.loads((Path(__file__).parent / "goldens.json").read_text())


@pytest.fixture
def engine(db):
    with aj.Engine(db, slots=4) as engine:
        yield engine


def logprobs(all_logits, ids):
    logits = all_logits(ids).astype(np.float64)
    logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return [float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1)]


def test_scores_come_in_the_order_of_the_pairs(engine, rng, all_logits, greedy):
    first, second = rng.integers(3, 256, 40).tolist(), rng.integers(3, 256, 25).tolist()
    best = greedy(first, 3)
    pairs = [(second, [70, 80]), (first, best), (second, [90]), (first, [best[0], best[1] ^ 1])]
    found = Answering(engine).scores(pairs)
    for (prompt, completion), (logprob, is_greedy) in zip(pairs, found, strict=True):
        want = logprobs(all_logits, [*prompt, *completion])[len(prompt) - 1 :]
        assert logprob == pytest.approx(sum(want), abs=1e-3)
        assert is_greedy == (completion == best)


def test_a_long_prompt_loses_its_beginning_and_says_so(engine, rng, caplog):
    prompt, completion = rng.integers(3, 256, 60).tolist(), [70, 80, 90]
    answering = Answering(engine, max_length=32)
    with caplog.at_level(logging.WARNING):
        (short,) = answering.scores([(prompt[-29:], completion)])
        assert not caplog.messages
        (long,) = answering.scores([(prompt, completion)])
    assert long == pytest.approx(short, abs=1e-4)
    assert "1 of 1 prompts are longer than max_length=32" in caplog.messages[0]
    with pytest.raises(RequestError, match="32 tokens does not fit behind a prompt into 32"):
        answering.scores([(prompt, prompt[:32])])


@pytest.mark.parametrize("length", [1, 15, 16, 40])
def test_a_text_is_read_in_windows(engine, rng, all_logits, length):
    """Of at most 16 tokens: each token is scored once, the later ones behind as many as there are
    room for.
    """
    ids = rng.integers(3, 256, length).tolist()
    want, done = 0.0, min(15, length)
    want += sum(logprobs(all_logits, [3, *ids[:done]]))
    while done < length:
        end = min(done + 15, length)
        window = ids[end - 16 : end]
        want += sum(logprobs(all_logits, window)[done - end :])
        done = end
    assert Answering(engine, max_length=16).rolling(ids, 3) == pytest.approx(want, abs=3e-3)


def test_no_text_has_no_log_probability(engine):
    assert Answering(engine).rolling([], 3) == 0


def test_answers_are_what_generate_says(db, engine, rng):
    prompts = [rng.integers(3, 256, n).tolist() for n in (30, 50)]
    plan = aj.Window(sink=2, recent=8)
    asked = [AnswerSettings.of({"max_gen_toks": n}, 99) for n in (5, 9)]
    for attention in (None, plan):
        found = Answering(engine, attention).answers(prompts, asked)
        for prompt, wanted, text in zip(prompts, asked, found, strict=True):
            session, rest = db.create_session(prompt)
            with session:
                run = aj.generate(
                    session,
                    rest,
                    max_new_tokens=wanted.most,
                    attention=attention,
                    sampling=aj.Greedy(),
                )
                assert text == "".join(token.text for token in run)


def test_an_answer_keeps_its_room(engine, rng):
    prompt = rng.integers(3, 256, 60).tolist()
    answering = Answering(engine, max_length=32)
    asked = [AnswerSettings.of({}, 8)]
    assert answering.answers([prompt], asked) == answering.answers([prompt[-24:]], asked)
    with pytest.raises(RequestError, match="32 tokens leaves no room"):
        answering.answers([prompt], [AnswerSettings.of({}, 32)])


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_length_that_is_not_to_be_had(engine, length):
    with pytest.raises(RequestError, match=f"max_length={length}: from 2 to"):
        Answering(engine, max_length=length)


def test_what_tasks_ask_of_an_answer():
    def of(**settings):
        return AnswerSettings.of(settings, 7)

    assert of() == AnswerSettings(7, aj.Sampling(temperature=0))
    assert of(until="\n", max_tokens=3, do_sample=None) == AnswerSettings(
        3, aj.Sampling(temperature=0, stop=("\n",))
    )
    assert of(until=["a", ""], num_beams=1).sampling.stop == ("a",)
    # What draws would be made from says nothing where none are made.
    assert of(do_sample=False, temperature=0.7, top_p=0.9) == of()
    assert of(temperature=0.5).sampling == aj.Sampling(temperature=0.5)
    assert of(do_sample=True).sampling == aj.Sampling()
    assert of(do_sample=True, top_k=4, seed=2).sampling == aj.Sampling(top_k=4, seed=2)
    assert of(repetition_penalty=1.5).sampling.repetition_penalty == 1.5


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"typical_p": 0.3}, {"top_p": 7.0}])
def test_what_cannot_be_done_is_refused_by_name(settings):
    with pytest.raises(RequestError, match=next(iter(settings))):
        AnswerSettings.of({"do_sample": True, **settings}, 7)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    model = aj.load("smollm2-135m", dtype="float32", progress=False)
    path = tmp_path_factory.mktemp("bundled")
    with aj.DB(path, model, aj.Budget.for_pages(model, 260)) as db, aj.Engine(db) as engine:
        yield Answering(engine)


@pytest.mark.slow
def test_the_bundled_model_finds_what_lm_evals_hf_model_finds(bundled):
    """Of `make_goldens.py`: transformers through lm-eval, on the tasks beside it."""
    pairs, texts, answers = (GOLDENS[name] for name in ("pairs", "texts", "answers"))
    found = bundled.scores([(row["prompt"], row["completion"]) for row in pairs])
    for row, (logprob, is_greedy) in zip(pairs, found, strict=True):
        assert logprob == pytest.approx(row["logprob"], abs=1e-3)
        assert is_greedy == row["is_greedy"]
    for row in texts:
        assert bundled.rolling(row["ids"], row["first"]) == pytest.approx(row["logprob"], abs=1e-3)
    said = bundled.answers(
        [row["prompt"] for row in answers],
        [AnswerSettings.of(row["settings"], 256) for row in answers],
    )
    assert said == [row["answer"] for row in answers]
