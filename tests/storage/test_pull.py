"""What a pull gathers, and how much memory it takes."""

import tracemalloc

import numpy as np
import pytest

from alaya_jax.storage import in_flight
from alaya_jax.storage.pull import gathered
from alaya_jax.storage.push import push_chunks
from alaya_jax.storage.remote import RemoteContexts

MIB = 1 << 20


def test_what_is_gathered_has_no_name(open_store):
    store = open_store()
    before = sorted(store.path.rglob("*"))
    with gathered(store, (2, 3), np.dtype(np.float32)) as numbers:
        assert (numbers.shape, numbers.dtype) == ((2, 3), np.float32)
        numbers[:] = np.arange(6).reshape(2, 3)
        assert sorted(store.path.rglob("*")) == before
        np.testing.assert_array_equal(numbers, np.arange(6).reshape(2, 3))
    with gathered(store, (2, 0), np.dtype(np.float32)) as numbers:
        assert numbers.shape == (2, 0)


def test_a_push_says_what_it_wrote(open_store, watched, make, header):
    store, place = open_store(), watched()
    tokens, kv = make(600)
    id = store.write(header, tokens, kv).id
    moved, done = RemoteContexts(watched()).push(store, id).moved, []
    place = watched("memory://another/")
    assert push_chunks(place, store, moved, tokens, False, done.append)[0] == 3
    assert done == [moved.span_nbytes(span) for span in moved.spans()]
    assert push_chunks(place, store, moved, tokens, False, done.append) == (0, 0)
    assert sum(done) == 2 * moved.nbytes


@pytest.mark.slow
def test_memory_does_not_grow_with_the_context(
    tmp_path, open_store, watched, make, other, monkeypatch
):
    """Of 96 MiB, a twelfth of which is a layer, at most three times what is on its way, and one
    layer where it is written.
    """
    monkeypatch.setattr(in_flight, "BYTES", 4 * MIB)
    header = other(num_layers=12, num_kv_heads=4, head_dim=64)
    here, there = open_store(), open_store("there")
    tokens, kv = make(4096, header)
    id = here.write(header, tokens, kv).id
    place = watched(f"file://{tmp_path}/shared")
    nbytes = sum(x.nbytes for pair in kv for x in pair)
    assert nbytes == 96 * MIB
    del kv
    tracemalloc.start()
    remote = RemoteContexts(place)
    remote.push(here, id)
    assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    tracemalloc.reset_peak()
    remote.pull(there, remote.contexts()[0])
    assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    tracemalloc.stop()
    assert there.check(id) == []
