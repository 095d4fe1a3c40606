"""Streamers as transformers has them, and callbacks."""

import queue

import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError


class Recorder:
    """Takes what `transformers.TextStreamer` does with ids: shape, item, tolist."""

    def __init__(self):
        self.prompt, self.ids, self.ended = None, [], 0

    def put(self, value):
        assert not self.ended
        if self.prompt is None:
            assert len(value.shape) == 2
            assert value.shape[0] == 1
            self.prompt = value[0].tolist()
        else:
            self.ids.extend(value.tolist())

    def end(self):
        self.ended += 1


def test_a_streamer_gets_the_prompt_then_each_token(db, rng):
    prompt, seen = rng.integers(32, 127, 40), Recorder()
    session, rest = db.create_session(prompt)
    generation = aj.generate(session, rest, max_new_tokens=5, streamer=seen)
    for n, token in enumerate(generation):
        assert seen.ids[n] == token.id  # before it is yielded
    assert seen.prompt == prompt.tolist()
    assert seen.ids == generation.ids[0]
    assert seen.ended == 1
    generation.close()
    assert seen.ended == 1


def test_leaving_the_loop_ends_the_stream_and_gives_room_back(db, rng):
    session, rest = db.create_session(rng.integers(32, 127, 40))
    free, seen = db.pool.free_tokens, Recorder()
    for _ in aj.generate(session, rest, max_new_tokens=200, streamer=seen):
        if len(seen.ids) == 2:
            break
    assert seen.ended == 1
    assert db.pool.free_tokens >= free - 64


def test_a_callback_ends_it(db, rng):
    prompt = rng.integers(32, 127, 40)
    session, rest = db.create_session(prompt)
    whole = [token.id for token in aj.generate(session, rest, max_new_tokens=6)]
    session, rest = db.create_session(prompt)
    told = []
    generation = aj.generate(
        session, rest, max_new_tokens=6, on_token=lambda token: told.append(token) or len(told) == 3
    )
    assert [token.id for token in generation] == whole[:3]
    assert [token.id for token in told] == whole[:3]
    assert generation.finish_reason == "callback"
    assert [token.id for token in aj.generate(session, max_new_tokens=3)] == whole[3:]


def test_what_cannot_listen_is_refused(db, rng):
    session, rest = db.create_session(rng.integers(32, 127, 20))
    free = db.pool.free_tokens
    for wrong in (print, Recorder, object(), "stdout", queue.Queue()):
        with pytest.raises(RequestError, match=r"must have put\(ids\) and end\(\)"):
            aj.generate(session, rest, streamer=wrong)
    with pytest.raises(RequestError, match="must be a function of a token"):
        aj.generate(session, rest, on_token="stop")
    assert db.pool.free_tokens == free
    batch, rows = db.create_session([rest, rest[:9]])
    with pytest.raises(RequestError, match="takes one sequence"):
        aj.generate(batch, rows, streamer=Recorder())
    with pytest.raises(TypeError, match="stopping_criteria"):
        aj.generate(session, rest, stopping_criteria=[print])
