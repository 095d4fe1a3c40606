"""Any contexts, any prompt: what is matched and pulled, against the definition."""

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alaya_jax.storage import objects, pull, push, remote
from alaya_jax.storage.object_store import SharedStore
from alaya_jax.storage.remote import RemoteContexts

CHUNK = 4
numbers = itertools.count()
texts = st.lists(st.integers(0, 1), min_size=1, max_size=14)
fuzzed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture
def small_chunks(monkeypatch):
    for module in (objects, pull, push, remote):
        monkeypatch.setattr(module, "CHUNK", CHUNK)


def common(one, other):
    """How many tokens two lists have in common, from the first on."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return len(list(same))


def expected(contexts, prompt):
    """The most tokens that a context shares, in whole chunks or all of it."""
    shared = [(len(c), common(c, prompt)) for c in contexts]
    return max([n if found == n else found // CHUNK * CHUNK for n, found in shared], default=0)


@settings(fuzzed, max_examples=300)
@given(st.lists(texts, max_size=6), texts)
def test_the_longest_is_matched(small_chunks, header, contexts, prompt):
    place = SharedStore(f"memory://matched/{next(numbers)}/")
    place.put("alaya_remote.json", remote._MARK_TEXT)
    for tokens in map(np.asarray, contexts):
        names = tuple(objects.chunk_names(header, tokens))
        id = header.context_id(tokens)
        moved = objects.MovedContext(
            id=id, header=header, num_tokens=len(tokens), created=0.0, chunks=names
        )
        place.put(f"contexts/{objects.group(header)}/{id}", objects.write_record(moved))
    found, length = RemoteContexts(place).match(header, np.asarray(prompt))
    assert length == expected(contexts, prompt)
    assert (found is None) == (length == 0)


@pytest.mark.slow
@settings(fuzzed, max_examples=30)
@given(st.lists(texts, min_size=1, max_size=4), st.lists(texts, max_size=3), st.data())
def test_whatever_is_here_and_there_arrives_whole(
    small_chunks, open_store, make, same, header, contexts, known, data
):
    i = next(numbers)
    here, there = open_store(f"here{i}"), open_store(f"there{i}")
    place = RemoteContexts(SharedStore(f"memory://moved/{i}/"))
    for tokens in contexts:
        place.push(here, here.write(header, *make(tokens)).id)
    for tokens in known:
        there.write(header, *make(tokens))
    prompt = data.draw(st.sampled_from(contexts)) + data.draw(texts)
    moved, length = place.match(header, np.asarray(prompt, np.int32))
    assert moved is not None
    record = place.pull(there, moved, length).record
    same(there, record.id, *make(prompt[:length]))
    for moved in place.contexts():
        same(there, place.pull(there, moved).record.id, *make(here.tokens(moved.id)))
    here.close()
    there.close()
