"""Requests in slots on the bundled model, with weights as they are stored."""

import pytest

import alaya_jax as aj
from tests.engine.conftest import said


@pytest.mark.slow
def test_conversations_side_by_side_say_what_each_says_alone(tmp_path, alone):
    """Prompts are messages; what they have in common is read once."""
    model = aj.load("smollm2-135m", quantize="stored", dtype="float32", progress=False)
    system = "You answer in one short sentence. " * 8
    questions = ("What is a river?", "What is a sea?", "Name two colours.", "What is rain?")
    with aj.DB(tmp_path / "db", model, aj.Budget.for_pages(model, 260)) as db:
        requests = [
            aj.Request(
                [{"role": "system", "content": system}, {"role": "user", "content": question}],
                24,
                sampling=sampling,
            )
            for question in questions
            for sampling in (aj.Greedy(), aj.Sampling(temperature=0.7, top_p=0.9, seed=5))
        ]
        rendered = [
            aj.Request(model.chat.render(list(r.prompt)), r.max_new_tokens, sampling=r.sampling)
            for r in requests
        ]
        expected = [alone(each, db) for each in rendered]
        with aj.Engine(db, slots=6) as engine:
            results = list(engine.run(requests))
        assert [said(result) for result in results] == expected
        assert sum(result.cached_tokens for result in results) > 7 * 48
        assert db.pool.free_tokens == db.pool.capacity_tokens
