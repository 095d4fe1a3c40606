"""What reading, writing and collecting share: rows that change, and the notes of use and damage."""

import pytest

from alaya_jax.errors import ContextError
from alaya_jax.storage import PoolStore, pool
from alaya_jax.storage.pool import Pool


@pytest.fixture
def opened(store, kit):
    """A database with a context, and its id."""
    id = kit.put(store, 40)
    opened = Pool(store.path, read_only=False)
    yield opened, id
    opened.close()


def test_a_row_changes_and_is_seen_by_others(opened, store):
    one, id = opened
    _, entry = one.entry(id)
    one.alter(entry, created=12.5)
    assert store.list()[0].created == 12.5
    store.remove(id)
    with pytest.raises(ContextError, match="no context"):
        one.alter(entry, created=13.5)
    with pytest.raises(ContextError, match="no context"):
        one.entry(id)


def test_use_is_noted_once_a_minute(opened, store, monkeypatch):
    one, id = opened
    monkeypatch.setattr("time.time", lambda: 2e9)
    one.touch(one.entry(id)[1])
    assert store.list()[0].used == 2e9
    version = store.version()
    monkeypatch.setattr("time.time", lambda: 2e9 + 30)
    one.touch(one.entry(id)[1])
    assert store.version() == version
    monkeypatch.setattr(pool, "_TOUCHED_EVERY", 10)
    one.touch(one.entry(id)[1])
    assert store.list()[0].used == 2e9 + 30


def test_damage_that_was_seen_is_noted_for_all(opened, store, kit):
    one, id = opened
    kit.flip_page(store, id, layer=1, kind=1, token=20)
    with PoolStore(store.path, read_only=True) as reader:
        with pytest.raises(ContextError, match="values of tokens 16 to 31 of layer 1"):
            reader.read_kv(id, 1)
        assert not one.catalogue.snapshot().damage, "a reader notes nothing"
    for _ in range(2):
        with pytest.raises(ContextError, match="values of tokens 16 to 31 of layer 1"):
            store.read_kv(id, 1)
    (damage,) = one.catalogue.snapshot().damage.values()
    assert (damage.slot, damage.birth) == (1, one.entry(id)[1].serial)
    store.remove(id)
    store.gc()
    assert not one.catalogue.snapshot().damage
