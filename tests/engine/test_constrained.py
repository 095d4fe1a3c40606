"""Requests whose text must be something, alone and beside others."""

import asyncio
import json
import re

import jsonschema
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError
from alaya_jax.runtime.sampling.constraint import Allowed
from tests.engine.conftest import said

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["fish", "bird"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
JSON = aj.Constraint(json_schema=SCHEMA)
WORDS = aj.Constraint(regex="[a-z]{2,5}( [a-z]{2,5}){3}")
SPELT = aj.Constraint(regex="[a-z]{60}")


def hot(seed: int, **more) -> aj.Sampling:
    return aj.Sampling(**({"temperature": 3.0, "seed": seed, "constraint": JSON} | more))


def checked(result) -> bool:
    """Whether it has ended by itself: what it says is valid then."""
    if result.finish_reason == "eos":
        jsonschema.validate(json.loads(result.text), SCHEMA)
    return result.finish_reason == "eos"


def test_each_gets_what_it_gets_alone(db, engines, alone, rng):
    """Constrained and not, greedy and at a high temperature, with filters and alternatives, one of
    them cancelled; and what ends is valid.
    """
    prompts = [rng.integers(3, 256, n) for n in (20, 33, 47)]
    asked = [
        *(aj.Request(prompts[i % 3], 90, sampling=hot(i)) for i in range(4)),
        aj.Request(prompts[0], 40, sampling=aj.Greedy(constraint=WORDS)),
        aj.Request(prompts[1], 30),
        aj.Request(prompts[2], 40, sampling=hot(7, top_k=5, top_p=0.9, frequency_penalty=0.5)),
        aj.Request(prompts[0], 30, sampling=aj.Sampling(seed=3)),
        aj.Request(prompts[1], 30, aj.Window(2, 6), sampling=aj.Greedy(constraint=WORDS)),
        aj.Request(prompts[2], 20, sampling=aj.Greedy(logprobs=2, constraint=WORDS)),
    ]
    expected = [alone(each) for each in asked]
    engine = engines(slots=12, chunk=32)
    leaves = engine.submit(asked[0], lambda token: True)
    results = list(engine.run(asked))
    assert [said(each) for each in results] == expected
    assert sum(checked(each) for each in results[:4]) >= 2
    assert all(re.fullmatch(WORDS.regex, results[i].text) for i in (4, 8, 9))
    assert leaves.result(30).finish_reason == "cancelled"


def test_the_likeliest_of_those_that_may_come(db, engines, rng, all_logits):
    """Greedy, against numpy; the log-probabilities are those of the model without the mask."""
    prompt = rng.integers(3, 256, 25).tolist()
    (result,) = engines().run([aj.Request(prompt, 40, sampling=aj.Greedy(constraint=WORDS))])
    follow = Allowed(WORDS, 0, (1, 2), db.model.tokenizer, 256)
    tokens, logprobs = list(prompt), []
    for _ in range(40):
        logits = all_logits(tokens)[-1].astype(np.float64)
        bits = np.unpackbits(follow.mask().view(np.uint8), bitorder="little").astype(bool)
        best = int(np.where(bits, logits, -np.inf).argmax())
        follow.accept(best)
        if best in (1, 2):
            break
        tokens.append(best)
        logprobs.append(logits[best] - np.log(np.exp(logits).sum()))
    assert result.finish_reason == "eos"
    assert result.ids == tuple(tokens[len(prompt) :])
    assert [t.logprob for t in result.tokens] == pytest.approx(logprobs, abs=1e-4)


def test_who_loses_its_pages_says_the_same(db, engines, alone, rng):
    constraint = aj.Constraint(regex="[ -~]{110}")
    requests = [
        aj.Request(rng.integers(3, 256, 300), 120, sampling=aj.Sampling(seed=i, constraint=c))
        for i, c in enumerate((constraint, None, constraint))
    ]
    expected = [alone(each) for each in requests]
    engine = engines(slots=3)
    assert [said(each) for each in engine.run(requests)] == expected
    assert engine.stats().preemptions > 0


def test_stops_and_ends(db, engines, alone, rng):
    """A stop string cuts it short, an id that ends it comes only where it may, and after as many
    tokens as must be.
    """
    prompt = rng.integers(3, 256, 30)
    free = aj.Request(prompt, 30, sampling=aj.Greedy(ignore_eos=True))
    first = alone(free)
    cut, end = first[1][4:6], first[0][3]
    asked = [
        aj.Request(prompt, 30, sampling=aj.Greedy(stop=cut)),
        aj.Request(prompt, 30, sampling=aj.Greedy(stop=cut, min_tokens=20)),
        aj.Request(prompt, 30, sampling=aj.Greedy(stop_ids=(end,))),
        aj.Request(prompt, 30, sampling=aj.Greedy(stop_ids=(end,), min_tokens=9)),
        aj.Request(prompt, 12, sampling=aj.Greedy(stop_ids=(end,), min_tokens=12)),
        aj.Request(prompt, 90, sampling=aj.Greedy(constraint=SPELT, stop="a")),
        aj.Request(prompt, 90, sampling=aj.Greedy(constraint=SPELT, stop_ids=(ord("7"),))),
    ]
    results = list(engines().run(asked))
    assert [said(each) for each in results] == [alone(each) for each in asked]
    stopped, least, ended, later, longest, word, whole = results
    assert (stopped.text, stopped.finish_reason) == (first[1][:4], "stop")
    assert len(least.ids) >= 20
    assert (len(ended.ids), ended.finish_reason) == (3, "eos")
    assert len(later.ids) >= 9
    assert end not in later.ids
    assert (len(longest.ids), longest.finish_reason) == (12, "length")
    assert re.fullmatch("[b-z]*", word.text)
    assert re.fullmatch("[a-z]{60}", whole.text)


def test_a_generation_goes_on_as_one_call_would(db, alone, rng):
    asked = aj.Request(rng.integers(3, 256, 30), 50, sampling=hot(5, constraint=SPELT))
    whole = alone(asked)
    session, rest = db.create_session(asked.prompt)
    pieces = []
    with session:
        for most in (7, 4, 41):
            for token in aj.generate(session, rest, max_new_tokens=most, sampling=asked.sampling):
                pieces.append(token)
                if len(pieces) == 9:
                    break  # left in the middle
            rest = ()
        assert tuple(t.id for t in pieces) == whole[0]
        other = aj.Greedy(constraint=aj.Constraint(regex="[0-9]+"))
        with pytest.raises(aj.AlayaError, match="not what its constraint lets follow"):
            aj.generate(session, max_new_tokens=3, sampling=other)


def test_a_batch_of_sessions(db, rng):
    prompts = [rng.integers(3, 256, 20), rng.integers(3, 256, 31)]
    each = [aj.Greedy(constraint=WORDS), aj.Greedy()]
    session, rest = db.create_session(prompts)
    with session:
        both = aj.generate(session, rest, max_new_tokens=25, sampling=each)
        list(both)
    for i in range(2):
        session, rest = db.create_session(prompts[i])
        with session:
            one = aj.generate(session, rest, max_new_tokens=25, sampling=each[i])
            list(one)
        assert one.ids[0] == both.ids[i]
    assert re.fullmatch(WORDS.regex, both.text[0])


def test_one_whose_constraint_fails_ends_alone(db, engines, alone, rng, monkeypatch):
    prompt = rng.integers(3, 256, 30)
    mask = Allowed.mask

    def breaks(self):
        if self._size == 256 and self._count == 5 and self._least == 1:
            raise aj.AlayaError("a constraint cannot be kept any longer")
        return mask(self)

    healthy = aj.Request(prompt, 40, sampling=aj.Greedy(constraint=SPELT))
    sick = aj.Request(prompt, 40, sampling=aj.Greedy(constraint=SPELT, min_tokens=1))
    expected = alone(healthy)
    monkeypatch.setattr(Allowed, "mask", breaks)
    engine = engines()
    running = [engine.submit(each) for each in (healthy, sick, healthy)]
    with pytest.raises(aj.AlayaError, match="kept any longer"):
        running[1].result(30)
    assert len(running[1].tokens) == 4
    assert [said(running[i].result(30)) for i in (0, 2)] == [expected] * 2


def test_refused_at_once(db, engines, open_db, tiny_model):
    engine = engines()
    nothing_ends = aj.Greedy(constraint=WORDS, ignore_eos=True)
    with pytest.raises(RequestError, match="ends its text"):
        engine.submit(aj.Request("Hello", 5, sampling=nothing_ends))
    with pytest.raises(RequestError, match="min_tokens=6 and max_new_tokens=5"):
        aj.Request("Hello", 5, sampling=aj.Greedy(min_tokens=6))
    session, rest = db.create_session("Hello")
    with session, pytest.raises(RequestError, match="min_tokens=6 and max_new_tokens=5"):
        aj.generate(session, rest, max_new_tokens=5, sampling=aj.Greedy(min_tokens=6))


def test_in_a_coroutine(engines, rng):
    running = engines().submit(aj.Request(rng.integers(3, 256, 9), 90, sampling=hot(1)))

    async def read():
        return "".join([token.text async for token in running]), await running

    text, result = asyncio.run(read())
    assert text == result.text
    checked(result)


@pytest.mark.slow
def test_on_a_mesh(on_mesh, tiny_model, open_db, engines, alone, rng):
    prompt = rng.integers(3, 256, 20)
    asked = [
        aj.Request(prompt, 30, sampling=aj.Greedy(constraint=WORDS)),
        aj.Request(prompt, 20, sampling=aj.Sampling(seed=1, top_p=0.9, temperature=1.5)),
    ]
    plain = open_db(path="plain")
    expected = [alone(each, plain) for each in asked]
    db = open_db(on_mesh(tiny_model, aj.make_mesh(kv_heads=2)), "mesh")
    assert [alone(each, db) for each in asked] == expected
    assert [said(each) for each in engines(db).run(asked)] == expected
