"""Nothing is compiled for a request of ordinary shape, once an engine is warm."""

import jax
import pytest

import alaya_jax as aj
from alaya_jax.compilation import by_name


def made(before) -> dict[str, int]:
    """Programs by name that were compiled, or read from disk, since."""
    return {name: n for name in by_name if (n := by_name[name] - before[name])}


def test_nine_programs_and_then_none(engines, rng):
    """Alone and many at once; of all temperatures and filters; prompts of one chunk and of more."""
    jax.clear_caches()
    engine = engines(slots=16, chunk=100)
    before = by_name.copy()
    engine.warm_up()
    assert made(before) == {"_zeros": 1, "layers": 6, "end": 3}, "the first fills the cache"
    assert engine.stats().programs == 9
    samplings = [
        aj.Greedy(),
        aj.Sampling(seed=3),
        aj.Sampling(top_p=0.9, temperature=0.7),
        aj.Sampling(top_k=5, min_p=0.1, stop="e", stop_ids=(77, 78)),
    ]
    asked = [
        aj.Request(rng.integers(3, 256, n), 4 + i % 7, sampling=samplings[i % 4])
        for i, n in enumerate([5, 8, 9, 65, 130, *rng.integers(1, 40, 9)])
    ]
    before = by_name.copy()
    results = [engine.submit(each).result() for each in asked[:5]]
    results += engine.run(asked)
    assert made(before) == {}
    assert [each.programs for each in results] == [0] * len(results)


def test_it_shares_nothing(db, engines):
    db.import_context([0] * 100, progress=False)
    engine = engines(slots=16)
    engine.warm_up()
    assert engine.stats().tokens_reused == 0
    assert engine.submit(aj.Request([0] * 100, 2)).result().cached_tokens == 99


@pytest.mark.slow
def test_a_plan_and_other_kinds(db, engines, rng):
    jax.clear_caches()
    engine = engines(slots=4)
    plan = aj.DIPR(beta=2.0, window=aj.Window(2, 6))
    kinds = [aj.Greedy(), aj.Greedy(logprobs=1), aj.Greedy(min_tokens=1)]
    engine.warm_up(plan, kinds)
    before = by_name.copy()
    constraint = aj.Constraint(regex="[a-z]{3,9}")
    samplings = [
        aj.Sampling(seed=5),
        aj.Sampling(presence_penalty=1.0, logit_bias={5: 1.0}),
        aj.Sampling(logprobs=20),
        aj.Sampling(constraint=constraint),
        aj.Greedy(constraint=constraint),
    ]
    prompts = [rng.integers(3, 256, n) for n in (3, 40, 90, 17, 5)]
    pairs = zip(prompts, samplings, strict=True)
    asked = [aj.Request(prompt, 12, plan, sampling=sampling) for prompt, sampling in pairs]
    for each in asked:
        engine.submit(each).result()
    list(engine.run(asked))
    assert made(before) == {}


@pytest.mark.parametrize("slots", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_few_slots_and_short_chunks(engines, rng, slots):
    jax.clear_caches()
    engine = engines(slots=slots, chunk=8)
    before = by_name.copy()
    engine.warm_up()
    rows = min(slots, 2)
    assert made(before) == {"_zeros": 1, "layers": 1 + rows, "end": rows}
    before = by_name.copy()
    list(engine.run(aj.Request(rng.integers(3, 256, 20), 9) for _ in range(5)))
    assert made(before) == {}
