"""Several calls of `generate` say what one call says."""

import dataclasses

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.models.tokenizer import Tokenizer
from alaya_jax.runtime.sampling.params import StopText

NEW = 24
EMOJI = list("\U0001f600".encode())  # a token is a byte


@pytest.fixture
def prompt(rng):
    return rng.integers(3, 256, 37)


def pieces(db, prompt, cuts, how, **options):
    """Ids and text of calls that end at each of `cuts`, by `break` or by max_new_tokens."""
    session, rest = db.create_session(prompt)
    ids, said = [], ""
    for cut in [*cuts, NEW]:
        left = NEW - len(ids)
        most = left if how == "break" else cut - len(ids)
        generation = aj.generate(session, rest, max_new_tokens=most, **options)
        for token in generation:
            ids.append(token.id)
            said += token.text
            if how == "break" and len(ids) == cut:
                break
        generation.close()
        if generation.finish_reason in ("stop", "eos"):
            break
        rest = ()
    return ids, said


@pytest.mark.parametrize("how", ["break", "length"])
@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 1.5}, {"repetition_penalty": 3.0}]
)
def test_penalties_count_what_an_earlier_call_said(db, prompt, penalty, how):
    sampling = aj.Greedy(**penalty)
    whole = pieces(db, prompt, [], how, sampling=sampling)
    assert whole != pieces(db, prompt, [], how), "the penalty changes nothing"
    assert pieces(db, prompt, [1, 5, 6, 17], how, sampling=sampling) == whole


def test_a_batch_counts_for_each_sequence(db, rng):
    prompts = [rng.integers(3, 256, n) for n in (20, 9)]
    sampling = aj.Greedy(frequency_penalty=2.0)
    session, rest = db.create_session(prompts)
    whole = aj.generate(session, rest, max_new_tokens=12, sampling=sampling)
    list(whole)
    session, rest = db.create_session(prompts)
    first = aj.generate(session, rest, max_new_tokens=7, sampling=sampling)
    list(first)
    second = aj.generate(session, max_new_tokens=5, sampling=sampling)
    list(second)
    assert [a + b for a, b in zip(first.ids, second.ids, strict=True)] == whole.ids


def test_tokens_that_are_given_begin_another_output(db, prompt):
    """The next turn of a conversation: what was said before is prompt now."""
    sampling = aj.Greedy(presence_penalty=2.0, frequency_penalty=2.0)
    session, rest = db.create_session(prompt)
    first = aj.generate(session, rest, max_new_tokens=9, sampling=sampling)
    list(first)
    turn = prompt[:5]
    second = aj.generate(session, turn, max_new_tokens=9, sampling=sampling)
    list(second)
    fresh, rest = db.create_session([int(i) for i in (*prompt, *first.ids[0], *turn)])
    alone = aj.generate(fresh, rest, max_new_tokens=9, sampling=sampling)
    list(alone)
    assert second.ids == alone.ids


@pytest.mark.parametrize("how", ["break", "length"])
@pytest.mark.parametrize("cut", [4, 5, 6])
def test_a_stop_string_may_begin_in_one_call_and_end_in_the_next(db, greedy, prompt, how, cut):
    expected = bytes(greedy(prompt, NEW)).decode()
    stop = expected[3:7]
    sampling = aj.Greedy(stop=[stop, "never said"])
    whole = pieces(db, prompt, [], how, sampling=sampling)
    assert whole[1] == expected[: expected.index(stop)]
    ids, said = pieces(db, prompt, [cut], how, sampling=sampling)
    assert ids == whole[0]
    # What may have begun a stop string is held back by break, and said at the end of a call.
    assert said == (whole[1] if how == "break" else expected[:cut])


@pytest.mark.parametrize("how", ["break", "length"])
def test_half_a_character_waits_for_its_other_half(db, prompt, how):
    session, rest = db.create_session(prompt)
    said = ""
    for i, byte in enumerate(EMOJI * 2):
        sampling = aj.Greedy(logit_bias={byte: 1e4})
        most = 1 if how == "length" else 5
        for token in aj.generate(
            session, rest if i == 0 else (), max_new_tokens=most, sampling=sampling
        ):
            said += token.text
            break
    assert said == "\U0001f600" * 2


def test_a_fork_goes_on_by_itself(db, prompt):
    session, rest = db.create_session(prompt)

    def say(session, tokens, byte):
        sampling = aj.Greedy(logit_bias={byte: 1e4}, presence_penalty=1.0)
        (token,) = aj.generate(session, tokens, max_new_tokens=1, sampling=sampling)
        return token.text

    assert say(session, rest, EMOJI[0]) == ""
    assert say(session, (), EMOJI[1]) == ""
    other = session.fork()
    assert say(session, (), EMOJI[2]) == ""
    assert say(other, (), 0x41) == "�A"
    assert say(session, (), EMOJI[3]) == "\U0001f600"
    assert other.outputs[0].ids == [*EMOJI[:2], 0x41]


def test_a_padded_vocabulary_goes_on(open_db, tiny_model, prompt):
    """Ids that the tokenizer has no token for are rows of the model all the same."""
    backend = tiny_model.tokenizer._backend
    small = {text: i for text, i in backend.get_vocab().items() if i < 200}
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    fewer = Backend(models.BPE(vocab=small, merges=[]))
    fewer.pre_tokenizer, fewer.decoder = backend.pre_tokenizer, backend.decoder
    db = open_db(dataclasses.replace(tiny_model, tokenizer=Tokenizer(fewer)))
    session, rest = db.create_session(prompt)
    sampling = aj.Greedy(logit_bias={230: 1e4})
    assert [(t.id, t.text) for t in aj.generate(session, rest, max_new_tokens=3, sampling=sampling)]
    text = [(t.id, t.text) for t in aj.generate(session, max_new_tokens=2, sampling=sampling)]
    assert text == [(230, ""), (230, "")]
    with pytest.raises(aj.AlayaError, match=r"token id 230 has no token"):
        db.model.tokenizer.decode([230])
    assert Tokenizer(fewer, padded_to=256).decode([65, 230, 66]) == "AB"


@pytest.mark.parametrize("seed", range(40))
def test_stop_strings_over_calls_are_those_of_one(seed):
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(list("ab"), 30))
    stop = ["".join(rng.choice(list("ab"), rng.integers(2, 7))) for _ in range(2)]
    whole = StopText(stop)
    expected = "".join(whole.put(c) for c in text)
    for at in range(1, 30):
        matcher = StopText(["zz"] if seed % 2 else stop)
        said = "".join(matcher.put(c) for c in text[:at]) if seed % 2 == 0 else ""
        if seed % 2:  # another call's strings, and all of it with the reader
            said = "".join(matcher.put(c) for c in text[:at]) + matcher.flush()
        if matcher.stopped:
            assert said == expected
            continue
        again = matcher.going_on(stop)
        said += "".join(again.put(c) for c in text[at:])
        if seed % 2 == 0:
            assert (said, again.stopped) == (expected, whole.stopped)
            continue
        ends = [text.find(s, max(0, at - len(s) + 1)) + len(s) for s in stop]
        ends = [e for s, e in zip(stop, ends, strict=True) if e >= len(s)]
        assert again.stopped == bool(ends)
