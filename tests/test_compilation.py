"""Programs compile once and are few, are kept for later processes, and are told apart from work."""

import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax import compilation
from alaya_jax.checkpoint import save
from alaya_jax.errors import RequestError
from alaya_jax.runtime import programs, stack
from alaya_jax.runtime.stack import Stack


def test_prompts_of_fifty_lengths_compile_six_programs_at_most(db, rng):
    """One for each of three widths of a chunk, one of a step, the end of a step, an empty cache."""
    jax.clear_caches()
    before = aj.compilations()
    for n in (*range(2, 500, 10), 8, 64):
        session, rest = db.create_session(rng.integers(3, 256, n))
        sampling = aj.Sampling(temperature=0.7, top_p=0.9, seed=n)
        attention = aj.DIPR(beta=1.0 + n / 100)
        with session:
            run = aj.generate(
                session, rest, max_new_tokens=2 + n % 3, attention=attention, sampling=sampling
            )
            assert len(list(run)) == 2 + n % 3
    assert (aj.compilations() - before).programs <= 6


def test_compile_time_is_told_apart(db, rng):
    jax.clear_caches()

    def run():
        session, rest = db.create_session(rng.integers(3, 256, 20))
        with session:
            generation = aj.generate(session, rest, max_new_tokens=4)
            list(generation)
        return generation.timing

    first, second = run(), run()
    assert first.programs >= 3
    assert 0 < first.decode_compile_s < first.compile_s < first.first_token_s + first.decode_s
    assert first.tokens_per_s > 3 / first.decode_s
    assert (second.programs, second.compile_s, second.decode_compile_s) == (0, 0, 0)
    assert second.tokens_per_s == pytest.approx(3 / second.decode_s)


@pytest.mark.parametrize("after", [0, 1000])
def test_what_is_compiled_ahead_is_what_is_called(open_db, greedy, monkeypatch, after):
    """A chunk's program while the cache is allocated, a step's beside the prefill: no other is
    compiled when they are called.
    """
    prompt = list(range(3, 40))
    expected = greedy(prompt, 4)
    jax.clear_caches()
    monkeypatch.setattr(stack, "AHEAD_AFTER", after)
    session, rest = open_db().create_session(prompt)
    before = compilation.by_name["layers"]
    generation = aj.generate(session, rest, max_new_tokens=4)
    first = next(generation).id
    ahead = compilation.by_name["layers"] - before
    assert [first, *(token.id for token in generation)] == expected
    assert compilation.by_name["layers"] - before == 2
    assert generation.timing.programs >= 3, "the thread's are counted too"
    assert 0 < generation.timing.decode_compile_s < generation.timing.compile_s
    if after:
        assert ahead == 1, "nothing was worth a thread"


def test_programs_ahead_are_left_out_when_it_is_over():
    """And what fails there fails again where it is called."""
    made = []
    late = compilation.Ahead(1000)
    coming = late.add(lambda: made.append("late"))
    late.end()
    coming.wait()
    soon = compilation.Ahead(0)
    both = [soon.add(lambda: 1 / 0), soon.add(lambda: made.append("soon"))]
    for one in both:
        one.wait()
    soon.end()
    assert made == ["soon"]


def test_a_program_that_fails_between_groups_loses_nothing(
    open_db, tiny_model, greedy, monkeypatch
):
    """The layers before it wrote behind the tokens that the sequence has."""
    db = open_db()
    db._catalogue.stack = Stack(tiny_model.params, tiny_model.frame, 1)
    prompt = list(range(3, 40))
    real, calls = programs.layers, []

    def fails(*args, **static):
        calls.append(args)
        if len(calls) == 4:  # the second layer of the first step
            raise RuntimeError("no more")
        return real(*args, **static)

    fails.lower = real.lower
    monkeypatch.setattr(programs, "layers", fails)
    session, rest = db.create_session(prompt)
    generation = aj.generate(session, rest, max_new_tokens=5)
    first = next(generation).id
    with pytest.raises(RuntimeError, match="no more"):
        next(generation)
    again = [token.id for token in aj.generate(session, max_new_tokens=4)]
    assert [first, *again] == greedy(prompt, 5)


def test_what_compiles_long_is_told_on_a_terminal(monkeypatch, capsys):
    told = []
    monkeypatch.setattr(compilation, "PATIENCE", 0.01)
    monkeypatch.setattr(compilation, "_tell", told.append)
    with compilation.compiling(lambda: "five layers"):
        jax.block_until_ready(jax.jit(lambda x: x * 3.5 + 1)(np.arange(7)))
        time.sleep(0.1)
    with compilation.compiling(lambda: "nothing"):
        pass
    assert told == ["five layers"]
    monkeypatch.undo()
    compilation._tell("five layers")
    assert capsys.readouterr().err == "", "stderr is no terminal here"


CHILD = """
import sys, jax, alaya_jax as aj
model = aj.load(sys.argv[1], progress=False)
db = aj.DB(sys.argv[2], model, aj.Budget(device="1MiB"))
session, rest = db.create_session([5, 6, 7])
run = aj.generate(session, rest, max_new_tokens=3)
ids, done = [token.id for token in run], aj.compilations()
print(jax.config.jax_compilation_cache_dir, ids, done.programs, done.read, sep=";")
"""


@pytest.fixture
def in_a_process(tiny_model, tmp_path):
    save(tmp_path / "model", tiny_model.config, tiny_model.params, to="hf", progress=False)

    def run(**variables):
        drop = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
        env = {k: v for k, v in os.environ.items() if k not in drop}
        env |= {"ALAYA_CACHE": str(tmp_path / "cache"), **variables}
        number = len(list(tmp_path.glob("db*")))
        command = [
            sys.executable,
            "-c",
            CHILD,
            str(tmp_path / "model"),
            str(tmp_path / f"db{number}"),
        ]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        place, ids, programs_made, read = done.stdout.strip().splitlines()[-1].split(";")
        return place, ids, int(programs_made), int(read)

    return run


@pytest.mark.slow
def test_programs_are_kept_for_later_processes(in_a_process, tmp_path):
    place, ids, made, read = in_a_process()
    assert read == 0
    assert place.startswith(str(tmp_path / "cache" / "xla" / "jax-"))
    again = in_a_process()
    assert again[:3] == (place, ids, made)
    assert again[3] >= 3
    off = in_a_process(ALAYA_COMPILATION_CACHE="off")
    assert off == ("None", ids, made, 0)
    users = in_a_process(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "users"))
    assert users == (str(tmp_path / "users"), ids, made, 0)


def test_where_programs_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path))
    place = compilation.default_directory()
    assert place.parent == tmp_path / "xla"
    assert jax.__version__ in place.name
    monkeypatch.setattr(compilation, "_cpu", lambda: "another CPU")
    assert compilation.default_directory() != place
    with pytest.raises(RequestError, match="layers_per_program=0"):
        aj.load("smollm2-135m", layers_per_program=0)
