"""Streaming generation against the model alone, everything computed anew for each token."""

import contextlib
import dataclasses
import gc
import pickle

import jax
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError, TokenizerError
from alaya_jax.generation import Generation
from alaya_jax.runtime import programs

NEW = 22  # tokens: more than two device calls
WINDOW = aj.Window(sink=2, recent=3)
DRAWN = aj.Sampling(temperature=0.9, top_p=0.9, seed=5, logprobs=3)


@pytest.fixture
def prompt(rng):
    return rng.integers(3, 256, 37)


def run(db, prompt, n=NEW, **options) -> Generation:
    """A finished generation in a session of its own, whose pages are all given back."""
    session, rest = db.create_session(prompt)
    with session:
        generation = aj.generate(session, rest, max_new_tokens=n, **options)
        tokens = list(generation)
    for b, ids in enumerate(generation.ids):
        own = [t for t in tokens if t.sequence == b]
        assert [t.id for t in own][: len(ids)] == ids
        text = generation.text if isinstance(generation.text, str) else generation.text[b]
        assert "".join(t.text for t in own) == text, "what was streamed is not what was said"
    return generation


@pytest.mark.smoke
@pytest.mark.parametrize(
    "attention",
    [aj.Full(), aj.DIPR(beta=float("inf"), window=WINDOW), aj.TopK(k=10_000, window=WINDOW)],
    ids=["full", "dipr", "topk"],
)
def test_greedy_equals_the_model_alone(db, greedy, prompt, attention):
    free = db.pool.free_tokens
    generation = run(db, prompt, attention=attention, prefill=attention)
    assert generation.ids == [greedy(prompt, NEW)]
    assert generation.text == bytes(generation.ids[0]).decode()
    assert generation.finish_reason == "length"
    assert generation.timing.prefill_tokens == len(prompt)
    assert generation.timing.decode_tokens == NEW - 1
    assert db.pool.free_tokens == free


def test_other_queries_change_the_answer(db, greedy, prompt):
    """Else the test above would pass for an engine that ignores the query."""
    narrow = aj.DIPR(beta=0.5, window=aj.Window(0, 1))
    one_prefill = run(db, prompt, prefill=narrow).ids
    one_decode = run(db, prompt, attention=narrow).ids
    assert greedy(prompt, NEW) not in (one_prefill[0], one_decode[0])
    assert one_prefill != one_decode


def test_a_query_for_each_layer(db, greedy, prompt):
    narrow = aj.DIPR(beta=0.5, window=aj.Window(0, 1))
    mixed = run(db, prompt, attention=(aj.Full(), narrow)).ids[0]
    assert mixed not in (greedy(prompt, NEW), run(db, prompt, attention=narrow).ids[0])


def test_a_beta_for_each_head(db, greedy, prompt):
    """Also in a second call of one session, which compares queries to keep the account."""
    session, rest = db.create_session(prompt)
    ids = []
    for _ in range(2):
        beta = np.full(4, np.inf, np.float32)
        attention = aj.DIPR(beta=jax.numpy.asarray(beta), window=WINDOW)
        ids += [t.id for t in aj.generate(session, rest, max_new_tokens=6, attention=attention)]
        rest = ()
    assert ids == greedy(prompt, 12)


def test_log_probabilities_are_those_of_the_model(db, all_logits, prompt):
    session, rest = db.create_session(prompt)
    tokens = list(aj.generate(session, rest, max_new_tokens=5, sampling=DRAWN))
    logits = all_logits([*prompt, *(t.id for t in tokens)]).astype(np.float64)
    expected = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    for i, token in enumerate(tokens):
        row = expected[len(prompt) - 1 + i]
        assert token.logprob == pytest.approx(row[token.id], abs=2e-4)
        best = np.argsort(-row)[:3]
        assert [id for id, _ in token.alternatives] == best.tolist()
        assert [p for _, p in token.alternatives] == pytest.approx(row[best], abs=2e-4)


def test_a_batch_equals_each_sequence_alone(db, greedy, rng):
    """Lengths, samplings and ends of their own; one ends early, the others go on."""
    prompts = [rng.integers(3, 256, n) for n in (30, 5, 61)]
    expected = [greedy(p, NEW) for p in prompts]
    end = expected[1][4]
    samplings = [aj.Greedy(logprobs=2), aj.Greedy(stop_ids=[end]), DRAWN]
    session, rest = db.create_session(prompts)
    together = aj.generate(session, rest, max_new_tokens=NEW, sampling=samplings)
    assert {(t.sequence, len(t.alternatives)) for t in together} == {(0, 2), (1, 0), (2, 3)}
    assert together.ids[0] == expected[0]
    assert together.ids[1] == expected[1][: expected[1].index(end)]
    assert together.ids[2] == run(db, prompts[2], sampling=DRAWN).ids[0]
    assert together.ids[2] != expected[2], "drawn, yet greedy"
    assert together.finish_reasons == ["length", "eos", "length"]
    assert together.text == [bytes(ids).decode() for ids in together.ids]


def test_the_seed_decides_and_nothing_else(db, prompt):
    one = run(db, prompt, sampling=DRAWN).ids
    assert run(db, prompt, sampling=DRAWN).ids == one
    assert run(db, prompt, sampling=dataclasses.replace(DRAWN, seed=2)).ids != one


def test_end_ids_of_model_tokenizer_and_request(open_db, tiny_model, greedy, prompt):
    expected = greedy(prompt, NEW)
    stop = expected[6]
    first = expected.index(stop)
    tokenizer = type(tiny_model.tokenizer)(tiny_model.tokenizer._backend, eos_ids=[stop])
    db = open_db(dataclasses.replace(tiny_model, tokenizer=tokenizer))
    ended = run(db, prompt)
    assert ended.ids == [expected[:first]]
    assert ended.finish_reason == "eos"
    assert run(db, prompt, sampling=aj.Greedy(ignore_eos=True)).ids == [expected]
    # A session goes on behind the end token, as a conversation does.
    session, rest = db.create_session(prompt)
    list(aj.generate(session, rest, max_new_tokens=NEW))
    assert session.length == len(prompt) + first
    going_on = aj.generate(session, max_new_tokens=2, sampling=aj.Greedy(ignore_eos=True))
    assert [t.id for t in going_on] == expected[first + 1 : first + 3]


@pytest.mark.parametrize("at", [2, 9])
def test_stop_strings_across_tokens(db, greedy, prompt, at):
    expected = bytes(greedy(prompt, NEW)).decode()
    stop = expected[at : at + 3]
    where = expected.index(stop)
    generation = run(db, prompt, sampling=aj.Greedy(stop=[stop, "never said"]))
    assert generation.text == expected[:where]
    assert generation.finish_reason == "stop"
    assert bytes(generation.ids[0]).decode() == expected[: where + 3]


def test_text_held_back_comes_out_at_the_end(db, greedy, prompt):
    """The start of a stop string is held back, and streamed when the sequence ends otherwise."""
    expected = greedy(prompt, NEW)
    text = bytes(expected).decode()
    stop = text[3:5] + "\x00"
    generation = run(db, prompt, 5, sampling=aj.Greedy(stop=stop))
    assert generation.text == text[:5]
    end = expected[5]
    assert end not in expected[:5], "another seed is needed"
    generation = run(db, prompt, sampling=aj.Greedy(stop=stop, stop_ids=[end]))
    assert (generation.text, generation.finish_reason) == (text[:5], "eos")
    assert generation.ids == [expected[:5]]


def test_half_a_character_comes_out_at_the_end(db, prompt):
    """At the end of the text. Behind max_new_tokens a call may follow, with the other half."""
    half = 0xC3  # the first of two bytes
    generation = run(db, prompt, 1, sampling=aj.Greedy(logit_bias={half: 1000.0}))
    assert (generation.ids, generation.text) == ([[half]], "")
    session, rest = db.create_session(prompt)
    list(aj.generate(session, rest, max_new_tokens=1, sampling=aj.Greedy(logit_bias={half: 1e3})))
    ends = aj.Greedy(logit_bias={2: 1000.0}, stop_ids=[2])
    assert aj.generate(session, max_new_tokens=1, sampling=ends).text == ""
    generation = aj.generate(session, max_new_tokens=1, sampling=ends)
    assert [t.text for t in generation] == ["�"]
    assert (generation.text, generation.finish_reason) == ("�", "eos")


def test_randomness_does_not_start_again_behind_a_break(db, prompt):
    unbroken = run(db, prompt, sampling=DRAWN).ids[0]
    session, rest = db.create_session(prompt)
    generation = aj.generate(session, rest, max_new_tokens=NEW, sampling=DRAWN)
    got = [next(generation).id for _ in range(9)]
    generation.close()
    got += [t.id for t in aj.generate(session, max_new_tokens=NEW - 9, sampling=DRAWN)]
    assert got == unbroken


@pytest.mark.parametrize("after", [1, 2, 3, 8])
def test_break_then_continue_equals_an_unbroken_run(db, greedy, prompt, after):
    expected = greedy(prompt, NEW)
    session, rest = db.create_session(prompt)
    for i, _ in enumerate(aj.generate(session, rest, max_new_tokens=NEW), start=1):
        if i == after:
            break
    assert session.length == len(prompt) + after - 1
    assert session.batch.pending == [[expected[after - 1]]]
    again = aj.generate(session, max_new_tokens=NEW - after)
    assert [t.id for t in again] == expected[after:]
    assert session.tokens[0].tolist() == [*prompt, *expected[:-1]]


def test_break_in_a_batch_then_continue(db, greedy, rng):
    """Left in the middle of a step: one sequence is a token ahead of the other."""
    prompts = [rng.integers(3, 256, n) for n in (20, 9)]
    expected = [greedy(p, 12) for p in prompts]
    session, rest = db.create_session(prompts)
    generation = aj.generate(session, rest, max_new_tokens=12)
    got = [next(generation) for _ in range(7)]
    generation.close()
    assert session.lengths == [20 + 3, 9 + 2]
    got += list(aj.generate(session, max_new_tokens=8))
    for b, want in enumerate(expected):
        assert [t.id for t in got if t.sequence == b] == want[: (12, 11)[b]]


def test_leaving_a_generation_gives_its_room_back(db, prompt):
    """Break at any token, also the first; closed before it began; or dropped and collected."""
    for taken in (0, 1, 2, 5):
        session, rest = db.create_session(prompt)
        generation = aj.generate(session, rest, max_new_tokens=200)
        for _ in range(taken):
            next(generation)
        generation.close()
        pages = -(-session.length // 16) if taken else 0
        assert db.pool.free_tokens == 1024 - 16 * pages
        session.close()
        assert db.pool.free_tokens == 1024
    session, rest = db.create_session(prompt)
    next(aj.generate(session, rest, max_new_tokens=200))
    gc.collect()
    assert db.pool.free_tokens == 1024 - 16 * 3


def test_a_generation_that_is_dropped_gives_its_pages_back_at_once(db, prompt):
    """By break, by an error in the loop, or never begun: no garbage collector is waited for."""
    gc.disable()
    try:
        for _ in range(3):
            for _ in aj.generate(*db.create_session(prompt), max_new_tokens=200):
                break
            assert db.pool.free_tokens == 1024
            with contextlib.suppress(ZeroDivisionError):
                for _ in aj.generate(*db.create_session(prompt), max_new_tokens=200):
                    _ = 1 / 0
            assert db.pool.free_tokens == 1024
        session, rest = db.create_session(prompt)
        aj.generate(session, rest, max_new_tokens=200)
        assert db.pool.free_tokens == 1024
        next(aj.generate(session, rest, max_new_tokens=200))
        assert db.pool.free_tokens == 1024 - 16 * 3
    finally:
        gc.enable()


def test_what_generate_cannot_take(db, prompt):
    """Each names what to write instead."""
    session, rest = db.create_session(prompt)
    for call, match in (
        (lambda: aj.generate((session, rest)), r"generate\(tuple.*create_session"),
        (lambda: aj.generate(db, rest), r"generate\(DB.*create_session"),
        (lambda: aj.generate(session, rest, sampling=0.7), r"Sampling\(temperature"),
        (lambda: aj.generate(session, rest, sampling={"top_k": 3}), r"Sampling\(temperature"),
        (lambda: aj.generate(session, rest, sampling=[0.7]), r"Sampling\(temperature"),
        (lambda: aj.generate(session, "text"), "whole numbers.*model.encode"),
        (lambda: aj.generate(session, rest, max_new_tokens="9"), "max_new_tokens=9"),
        (lambda: pickle.dumps(aj.generate(session, rest)), "fork its session"),
    ):
        with pytest.raises(RequestError, match=match):
            call()


def test_an_abandoned_generation_does_not_touch_the_next_one(db, greedy, rng):
    """The variable of a loop that was left is bound anew: the old one is collected meanwhile.

    It must not give back pages that the new one has reserved: another session would take them, and
    both would write there.
    """
    prompt, other = rng.integers(3, 256, 37), rng.integers(3, 256, 60)
    expected = greedy(prompt, 40)
    session, rest = db.create_session(prompt)
    generation = aj.generate(session, rest, max_new_tokens=40)
    next(generation), next(generation)
    generation = aj.generate(session, max_new_tokens=38)
    got = [next(generation).id]
    gc.collect()
    neighbour, its_rest = db.create_session(other)
    its_first = its_rest[:-1]
    neighbour.prefill(its_first)
    got += [t.id for t in generation]
    assert got == expected[2:]
    neighbours = aj.generate(neighbour, its_rest[-1:], max_new_tokens=6)
    assert [t.id for t in neighbours] == greedy(other, 6)


def test_a_generation_that_was_overtaken_says_so(db, greedy, prompt):
    expected = greedy(prompt, 12)
    session, rest = db.create_session(prompt)
    old = aj.generate(session, rest, max_new_tokens=12)
    next(old)
    new = aj.generate(session, max_new_tokens=11)
    second = next(new).id
    with pytest.raises(RequestError, match="another call"):
        next(old)
    old.close()
    assert [second, *(t.id for t in new)] == expected[1:]
    assert list(new) == []
    session.prefill([7])
    assert list(new) == [], "it had ended before"


def test_a_closed_session_is_refused(db, prompt):
    session, rest = db.create_session(prompt)
    generation = aj.generate(session, rest, max_new_tokens=12)
    next(generation)
    session.close()
    neighbour, its_rest = db.create_session(prompt)
    neighbour.prefill(its_rest)
    before = [np.array(x) for x in db.pool.read(neighbour.sequences[0], 0)]
    with pytest.raises(RequestError, match="closed"):
        list(generation)
    generation.close()
    for x, y in zip(before, db.pool.read(neighbour.sequences[0], 0), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(RequestError, match="closed"):
        aj.generate(session, rest)


def test_two_sessions_take_turns(db, greedy, rng):
    prompts = [rng.integers(3, 256, n) for n in (31, 18)]
    sessions = [db.create_session(p) for p in prompts]
    running = [aj.generate(s, rest, max_new_tokens=NEW) for s, rest in sessions]
    steps = [[t.id for t in step] for step in zip(*running, strict=True)]
    assert [list(ids) for ids in zip(*steps, strict=True)] == [greedy(p, NEW) for p in prompts]


def test_a_generation_stays_in_its_own_pages(db, greedy, rng):
    """Its room ends with a page, and the next page is a neighbour's, who is there already."""
    prompts = [rng.integers(3, 256, n) for n in (37, 40)]
    session, rest = db.create_session(prompts[0])
    generation = aj.generate(session, rest, max_new_tokens=12)  # the last one is not fed
    own = session.sequences[0].pages
    assert len(own) * 16 == 37 + 11
    neighbour, its_rest = db.create_session(prompts[1])
    neighbour.prefill(its_rest[:-1])
    assert neighbour.sequences[0].pages[0] == own[-1] + 1
    assert [t.id for t in generation] == greedy(prompts[0], 12)
    its_own = aj.generate(neighbour, its_rest[-1:], max_new_tokens=6)
    assert [t.id for t in its_own] == greedy(prompts[1], 6)


def test_not_finite_logits_are_an_error_and_the_database_goes_on(open_db, tiny_model, greedy, rng):
    prompt = rng.integers(3, 256, 37)
    expected = greedy(prompt, NEW)
    poison = expected[9]
    embedding = tiny_model.params["embed"]["embedding"].at[poison].set(np.nan)
    prompt[prompt == poison] = 3
    params = {**tiny_model.params, "embed": {"embedding": embedding}}
    db = open_db(dataclasses.replace(tiny_model, params=params))
    session, rest = db.create_session(prompt)
    generation = aj.generate(session, rest, max_new_tokens=NEW)
    with pytest.raises(aj.AlayaError, match=r"not finite after .*float32"):
        list(generation)
    got = generation.ids[0]
    assert got[-1] == poison
    assert session.batch.pending == [[poison]]
    assert session.length == len(prompt) + len(got) - 1
    assert db.pool.free_tokens == 1024 - 16 * -(-session.length // 16)
    healthy, rest = db.create_session(prompt)
    assert [t.id for t in aj.generate(healthy, rest, max_new_tokens=3)] == got[:3]
    first_token, rest = db.create_session([*prompt, poison])
    with pytest.raises(aj.AlayaError, match="not finite"):
        next(aj.generate(first_token, rest, max_new_tokens=200))
    first_token.close()
    healthy.close()
    session.close()
    assert db.pool.free_tokens == 1024


def test_ctrl_c_leaves_a_usable_database(db, greedy, prompt, ctrl_c, monkeypatch):
    """While a program runs it is put off; then the loop is left as by break."""
    expected = greedy(prompt, NEW)
    session, rest = db.create_session(prompt)
    real, calls = programs.layers, []

    def interrupted(*args, **static):
        calls.append(args)
        if len(calls) == 3:
            ctrl_c()
        return real(*args, **static)

    interrupted.lower = real.lower
    monkeypatch.setattr(programs, "layers", interrupted)
    generation = aj.generate(session, rest, max_new_tokens=NEW)
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    got = generation.ids[0]
    monkeypatch.undo()
    assert len(calls) == 3
    assert 0 < len(got) < NEW
    again = [t.id for t in aj.generate(session, max_new_tokens=NEW - len(got))]
    assert got + again == expected


def test_ctrl_c_between_chunks_feeds_no_token_twice(db, greedy, rng):
    prompt, more = rng.integers(3, 256, 20), rng.integers(3, 256, 540)
    session, rest = db.create_session(prompt)
    first = next(aj.generate(session, rest, max_new_tokens=1)).id
    assert session.batch.pending == [[first]]
    assert session.model.config.max_length == 512

    def interrupt(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.prefill(more[:40], on_chunk=interrupt)
    fed = session.length - len(prompt)
    assert session.tokens[0].tolist() == [*prompt, first, *more[: fed - 1]]
    session.prefill(more[fed - 1 : 60])
    assert session.tokens[0].tolist() == [*prompt, first, *more[:60]]
    expected = greedy([*prompt, first, *more[:61]], 4)
    assert [t.id for t in aj.generate(session, more[60:61], max_new_tokens=4)] == expected


def test_requests_that_cannot_be_served(db, tiny_model, open_db, prompt):
    session, rest = db.create_session(prompt)
    free = db.pool.free_tokens

    def refused(match, *args, error=RequestError, **options):
        with pytest.raises(error, match=match):
            aj.generate(session, *args, **options)
        assert db.pool.free_tokens == free

    refused("at least 1", rest, max_new_tokens=0)
    refused("at least 1", rest, max_new_tokens=2.5)
    refused("at least one token")
    refused("vocabulary", [256])
    refused("whole numbers", [1.5])
    refused("whole numbers", [[1, 2], [3]])
    refused("whole numbers", "text")
    refused("exceed the 512 .*at most 512 more", [3] * 512, max_new_tokens=2)
    aj.generate(session, [3] * 512, max_new_tokens=1).close()  # fits to the last token
    refused("2 layers", rest, attention=(aj.Full(),))
    refused("attention", rest, attention="full")
    refused("4 query heads", rest, attention=aj.DIPR(beta=jax.numpy.ones(3)))
    refused("2 Sampling", rest, sampling=[aj.Greedy()] * 2)
    bare, rest = open_db(dataclasses.replace(tiny_model, tokenizer=None), "bare").create_session(
        prompt
    )
    with pytest.raises(TokenizerError, match="no tokenizer"):
        aj.generate(bare, rest, sampling=aj.Greedy(stop="x"))
    assert [t.text for t in aj.generate(bare, rest, max_new_tokens=2)] == ["", ""]
