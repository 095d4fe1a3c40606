"""A decoder, turn by turn, without a thread: what is under way, and whose pages are whose."""

import dataclasses

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.query.plan import Plan
from alaya_jax.runtime.decoder import Decoder, Failed, Preempted, Scored, alike
from alaya_jax.runtime.group import New
from alaya_jax.runtime.job import Job

FULL = Plan(aj.Full())


def job(prompt, most=10, attention=FULL, prefill=FULL, **settings):
    ids = np.asarray(prompt, np.int32)
    settings = {"split": len(ids), **settings}
    return Job(ids, attention, prefill, aj.Greedy(), (), most, **settings)


@pytest.fixture
def decoder(db):
    made = Decoder(db.pool, slots=8, chunk=64)
    yield made
    made.clear()
    assert db.pool.free_tokens == 1024


@pytest.fixture
def insert(db, decoder):
    def put(one):
        session, _ = db.create_session(one.row[: one.reusable + 1], tier="device")
        decoder.insert(one, session.batch)
        return one

    return put


def finish(decoder, *jobs):
    """Turns until these have all their tokens."""
    events = []
    while any(len(one.generated) < one.most for one in jobs):
        for event in decoder.turn():
            events.append(event)
            if isinstance(event, New) and len(event.slot.job.generated) == event.slot.job.most:
                decoder.remove(event.slot.job)
    return events


def test_jobs_say_what_the_model_alone_does(decoder, insert, greedy, rng):
    prompts = [rng.integers(3, 256, n) for n in (30, 5, 61, 90)]
    jobs = [insert(job(p, 9 + i)) for i, p in enumerate(prompts)]
    events = finish(decoder, *jobs)
    assert [one.generated for one in jobs] == [
        greedy(p, one.most) for p, one in zip(prompts, jobs, strict=True)
    ]
    assert all(isinstance(event, New) for event in events)
    assert decoder.generated == len(events) == sum(one.most for one in jobs)


def test_a_step_is_dispatched_before_the_last_one_is_read(decoder, insert, rng):
    one = insert(job(rng.integers(3, 256, 20), 30))
    decoder.turn()
    for count in range(6):
        (slot,) = decoder.held
        assert len(one.generated) == count
        assert slot.flying == 1
        decoder.turn()


def test_pages_are_kept_until_the_step_that_may_write_them_was_seen(db, decoder, insert, rng):
    one = insert(job(rng.integers(3, 256, 20), 30))
    while len(one.generated) < 5:
        decoder.turn()
    (slot,) = decoder.held
    assert slot.flying == 1
    held = db.pool.free_tokens
    decoder.remove(one)
    assert db.pool.free_tokens == held, "a step is under way"
    decoder.turn()
    assert slot.flying == 0
    assert db.pool.free_tokens == held, "seen at the end of the turn"
    decoder.turn()
    assert db.pool.free_tokens == 1024
    assert decoder.is_idle
    assert len(one.generated) == 5, "what came for it later counts no more"


def test_who_gets_pages_of_one_that_ended_is_not_disturbed(decoder, insert, greedy, rng):
    """The first ends by a decision of the host, with another step of it under way; its pages go to
    the next at once.
    """
    first, second = rng.integers(3, 256, 40), rng.integers(3, 256, 44)
    for _ in range(4):
        one = insert(job(first, 60))
        while len(one.generated) < 7:
            decoder.turn()
        pages = set(decoder.held[0].sequence.pages.tolist())
        decoder.remove(one)
        while not decoder.is_idle:
            decoder.turn()
        two = insert(job(second, 12))
        assert pages & set(decoder.held[0].sequence.pages.tolist())
        finish(decoder, two)
        assert two.generated == greedy(second, 12)
        decoder.clear()


def test_a_prefill_that_is_taken_out_gives_its_pages_back(db, decoder, insert, rng):
    one = insert(job(rng.integers(3, 256, 200)))
    decoder.turn()
    assert decoder.prefilling == 1
    decoder.remove(one)
    decoder.turn()
    assert decoder.is_idle
    assert db.pool.free_tokens == 1024


def test_a_turn_reads_a_chunk_and_what_fits_in_beside_it(decoder, insert, rng):
    jobs = [insert(job(rng.integers(3, 256, n), 50)) for n in (100, 20, 30, 40)]
    read, tokens = [], []
    while decoder.prefilling:
        decoder.turn()
        now = [one.prefilled for one in jobs]
        if not read or now != read[-1]:  # in the turn between, slots become one group
            read.append(now)
            tokens.append([len(one.generated) for one in jobs])
    assert read == [[64, 0, 0, 0], [100, 20, 0, 0], [100, 20, 30, 0], [100, 20, 30, 40]]
    assert tokens == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [2, 2, 1, 0]]


def test_one_that_was_preempted_goes_on_as_if_it_had_not_been(db, decoder, insert, greedy, rng):
    prompts = [rng.integers(3, 256, n) for n in (30, 50)]
    jobs = [insert(job(p, 20)) for p in prompts]
    while len(jobs[1].generated) < 9:
        decoder.turn()
    decoder._preempt()
    events = decoder.turn() + decoder.turn() + decoder.turn()
    assert [event.job for event in events if isinstance(event, Preempted)] == [jobs[1]]
    assert [slot.job for slot in decoder.held] == [jobs[0]]
    assert decoder.preemptions == 1
    insert(jobs[1])
    finish(decoder, *jobs)
    assert [one.generated for one in jobs] == [greedy(p, 20) for p in prompts]
    assert jobs[1].prefilled > 50


def test_generated_tokens_are_computed_again_by_their_own_plan(db, decoder, insert, rng):
    """What a plan of decoding made of them is not what a full prefill would."""
    window = Plan(aj.Window(sink=2, recent=6))
    prompt = rng.integers(3, 256, 40)
    whole = insert(job(prompt, 30, window))
    finish(decoder, whole)
    broken = insert(job(prompt, 30, window))
    for cut in (5, 13, 22):
        while len(broken.generated) < cut:
            decoder.turn()
        decoder._preempt()
        while not decoder.is_idle:
            decoder.turn()
        insert(broken)
    finish(decoder, broken)
    assert broken.generated == whole.generated


def test_pages_that_two_share_are_written_by_neither(db, decoder, insert, greedy, rng):
    """The one that they come from decodes on; so does the other, which outlives it."""
    prompt = rng.integers(3, 256, 64)
    one = insert(job(prompt, 40))
    while len(one.generated) < 20:
        decoder.turn()
    other = job([*prompt, *one.generated[:18], 7], 30)
    n, slot = decoder.shared(other)
    assert (n, slot) == (80, decoder.held[0])
    insert(other)
    assert other.reused == 80
    shared = decoder.held[1].sequence.pages[:5]
    assert shared.tolist() == decoder.held[0].sequence.pages[:5].tolist()
    assert db.pool.holders(shared).tolist() == [2] * 5
    finish(decoder, one)
    assert one.generated == greedy(prompt, 40)
    finish(decoder, other)
    assert other.generated == greedy(other.prompt, 30)


def test_who_shares_keys_of_another_way_says_so(decoder, insert, rng):
    """Else a third one would take them for exact."""
    window = Plan(aj.Window(sink=2, recent=6))
    prompt = rng.integers(3, 256, 80)
    one, two = job(prompt, 30, prefill=window), job([*prompt, 5], 30, prefill=window)
    insert(one)
    while not one.generated:
        decoder.turn()
    insert(two)
    assert two.reused == 80
    (_, slot) = decoder.held
    assert slot.batch.origins[0].exact(80) == 8
    assert decoder.shared(job([*prompt, 5], 30))[0] == 0


def test_keys_of_one_that_failed_are_not_shared(db, decoder, rng, open_db, tiny_model):
    poison = 200
    embedding = tiny_model.params["embed"]["embedding"].at[poison].set(np.nan)
    params = {**tiny_model.params, "embed": {"embedding": embedding}}
    sick = open_db(dataclasses.replace(tiny_model, params=params), "sick")
    decoder = Decoder(sick.pool, slots=4, chunk=64)
    prompt = [*rng.integers(3, 100, 40), poison]
    one = job(prompt)
    decoder.insert(one, sick.create_session(one.row, tier="device")[0].batch)
    events = [*decoder.turn(), *decoder.turn()]
    assert [event.id for event in events] == [-1]
    decoder.remove(one)
    assert decoder.held
    assert decoder.shared(job([*prompt, 5]))[0] == 0
    decoder.clear()
    assert sick.pool.free_tokens == 1024


def test_a_step_that_fails_fails_its_group_alone(decoder, insert, rng, monkeypatch):
    window = Plan(aj.Window(sink=2, recent=6))
    good, bad = (insert(job(rng.integers(3, 256, 9), 20, p)) for p in (FULL, window))
    while len(bad.generated) < 3:
        decoder.turn()
    group = next(g for g in decoder._groups if g.members[0].job is bad)

    def broken():
        raise MemoryError("no more")

    monkeypatch.setattr(group, "step", broken)
    events = finish(decoder, good)
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert failed.job is bad
    assert isinstance(failed.error, MemoryError)
    assert len(decoder.held) <= 1


def test_scores_stay_for_whoever_shares_the_prompt(decoder, insert, rng):
    prompt = rng.integers(3, 256, 40)
    one = insert(job(prompt, 0, scored=30))
    assert decoder.turn() == [Scored(one)]
    assert sum(count for _, count, _ in one.scores) == 39
    other = job([*prompt, 5], 0, scored=40)
    assert decoder.shared(other)[0] == 32
    insert(other)
    assert decoder.turn() == [Scored(other)]
    assert decoder.prefilled == 40 + 9


def test_plans_are_alike_by_their_numbers():
    one, other = (Plan(aj.DIPR(beta=beta)) for beta in (3.0, 4.0))
    assert alike(one) == alike(Plan(aj.DIPR(beta=3.0)))
    assert alike(one) != alike(other)
    assert alike((one, other)) == alike((one, other)) != alike((other, one))
    assert alike(FULL) != alike(one)
