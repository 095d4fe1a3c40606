"""The catalogue: what is in memory of a context, what is read for more, and who leaves first."""

import numpy as np
import pytest

from alaya_jax.errors import CacheFullError, ContextError

PAGE = 16


@pytest.fixture
def documents(db, rng):
    """Three contexts, none in memory."""
    made = [db.import_context(rng.integers(3, 256, n)) for n in (70, 100, 40)]
    for context in made:
        db._catalogue.drop(context)
    return made


def read(db, sequence):
    return [np.array(db.pool.read(sequence, layer)) for layer in range(2)]


def test_a_context_half_in_memory_is_read_on_from_where_its_pages_end(db, documents, monkeypatch):
    context, catalogue = documents[1], db._catalogue
    first = catalogue.lock(context, 37)  # two pages and a part of one
    asked, read_kv = [], catalogue.store.read_kv

    def counted(id, layer, start=0, stop=None):
        asked.append((layer, start, stop))
        return read_kv(id, layer, start, stop)

    monkeypatch.setattr(catalogue.store, "read_kv", counted)
    longer = catalogue.lock(context, 90)
    assert asked == [(0, 32, 90), (1, 32, 90)]
    assert longer.pages[:2].tolist() == first.pages[:2].tolist(), "full pages are shared"
    assert longer.pages[2] != first.pages[2]
    for layer, (k, v) in enumerate(read(db, longer)):
        want_k, want_v = read_kv(context.id, layer, 0, 90)
        np.testing.assert_array_equal(k, want_k)
        np.testing.assert_array_equal(v, want_v)
    catalogue.lock(context, 90)
    assert len(asked) == 2, "what is there is not read again"
    assert context.resident is not None
    assert context.resident.length == 90


def test_what_cannot_be_read_on_leaves_the_rest_in_memory(db, documents, monkeypatch):
    context, catalogue = documents[0], db._catalogue
    db.pool.release(catalogue.lock(context, 20))
    free = db.pool.free_tokens

    def damaged(*_):
        raise ContextError("damaged")

    monkeypatch.setattr(catalogue.store, "read_kv", damaged)
    with pytest.raises(ContextError):
        catalogue.lock(context, 70)
    assert (context.problem, db.pool.free_tokens) == ("damaged", free)
    assert context.resident is not None
    assert context.resident.length == 20


def test_locked_pages_stay_and_the_one_used_longest_ago_is_evicted(db, documents):
    catalogue = db._catalogue
    held = [catalogue.lock(c, c.num_tokens) for c in documents]
    want = read(db, held[0])
    db.pool.release(catalogue.lock(documents[0], 5))  # used again
    assert catalogue.evict()
    assert [c.resident is None for c in documents] == [False, True, False]
    assert catalogue.evict()
    assert catalogue.evict()
    assert not catalogue.evict()
    for was, now in zip(want, read(db, held[0]), strict=True):
        np.testing.assert_array_equal(was, now)
    for sequence in held:
        db.pool.release(sequence)


def test_a_context_that_alone_is_too_large_is_refused(open_db, rng, tiny_model):
    with open_db(pages=65) as large:
        context = large.import_context(rng.integers(3, 256, 200))
    small = open_db(pages=9)
    (stored,) = small.contexts
    assert stored.id == context.id
    with pytest.raises(CacheFullError):
        small._catalogue.lock(stored, 200)
    assert small.pool.free_tokens == 8 * PAGE


def test_the_longest_prefix_is_matched_and_its_last_token_left_over(db, documents):
    first, second, _ = documents
    match = db._catalogue.match
    assert match(first.tokens) == (first, 69)
    assert match(np.append(second.tokens, 7)) == (second, 100)
    assert match(np.array([2, 2, 2])) == (None, 0)
