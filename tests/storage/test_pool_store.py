"""A store of contexts in pool files: what is written comes back, and equal prefixes lie there once.

"Row" is a line of the catalogue of faults of other KV caches that the tests of this folder answer.
"""

import dataclasses
import threading

import numpy as np
import pytest

from alaya_jax.errors import ContextError, DatabaseError, RequestError
from alaya_jax.storage import ContextStore, PoolStore, objects

DTYPES = ["float32", "float16", "bfloat16", "int8", "fp8"]
PAGE = 16


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 700])
def test_round_trip(kit, tmp_path, dtype, count):
    header = dataclasses.replace(kit.stored_in(dtype), namespace="n")
    tokens, kv = kit.make(count, header)
    steps = []
    with PoolStore(tmp_path / "db") as store:
        id = store.write(
            header, tokens, kit.source(kv), lambda done, of: steps.append((done, of))
        ).id
    assert steps == [(1, 3), (2, 3), (3, 3)]

    with PoolStore(tmp_path / "db") as store:
        (record,) = store.list()
        assert (record.id, record.header, record.num_tokens) == (id, header, count)
        assert record.problem is None
        assert record.nbytes == sum(x.nbytes for pair in kv for x in pair)
        np.testing.assert_array_equal(store.tokens(id), tokens, strict=True)
        ranges = [(0, None), (0, 0), (count - 1, count), (count // 3, count // 2 + 1)]
        for layer, (k, v) in enumerate(kv):
            for start, stop in ranges:
                got_k, got_v = store.read_kv(id, layer, start, stop)
                np.testing.assert_array_equal(got_k, k[:, start:stop], strict=True)
                np.testing.assert_array_equal(got_v, v[:, start:stop], strict=True)
                assert not got_k.flags.writeable
        assert store.check(id) == []


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "g"},
        {"namespace": "other"},
        {"dtype": "float16"},
        {"page_size": 32},
        {"head_dim": 4},
        {"num_kv_heads": 1},
        {"origin": ((3, "Window()"),)},
        {"origin": ((0, "storage in int8"),), "store_dtype": "int8"},
    ],
    ids=str,
)
def test_what_differs_is_stored_apart(kit, store, change):
    """Rows 17 to 20: whatever changes numbers is in the name, and shares no page; the same hits."""
    tokens, kv = kit.make(20)
    other = dataclasses.replace(kit.HEADER, **change)
    ids = [store.write(kit.HEADER, tokens, kit.source(kv)).id]
    theirs = kit.make(20, other, seed=1)[1]
    starts = []
    ids.append(store.write(other, tokens, kit.source(theirs, starts)).id)
    assert starts == [0], "nothing is lent"
    assert len(set(ids)) == 2
    for id, want in zip(ids, (kv, theirs), strict=True):
        np.testing.assert_array_equal(store.read_kv(id, 1)[0], want[1][0])
    again = store.write(other, tokens[:7], kit.must_not_run)
    assert again.num_tokens == 7, "the same shares"
    store.remove(again.id)
    assert [r.id for r in store.list()] == ids  # oldest first
    assert [r.header for r in store.list()] == [kit.HEADER, other]


@pytest.mark.parametrize(("layer", "start", "stop"), [(3, 0, 1), (-1, 0, 1), (0, 0, 21), (0, 5, 4)])
def test_reading_outside(kit, store, layer, start, stop):
    id = kit.put(store)
    with pytest.raises(RequestError, match="has layers 0 to 2 and 20 tokens"):
        store.read_kv(id, layer, start, stop)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int8"},
        {"num_layers": 0},
        {"head_dim": 2.0},
        {"namespace": None},
        {"store_dtype": "int4"},
    ],
    ids=str,
)
def test_wrong_header(kit, change):
    with pytest.raises(RequestError, match=f"context: {next(iter(change))}="):
        dataclasses.replace(kit.HEADER, **change)


def test_what_is_coded_cannot_say_that_it_is_exact(kit):
    with pytest.raises(RequestError, match="keys and values in int8 are not exact"):
        dataclasses.replace(kit.HEADER, store_dtype="int8")
    with pytest.raises(RequestError, match="begin origin at token 0"):
        dataclasses.replace(kit.HEADER, store_dtype="fp8", origin=((3, "Window()"),))


def test_what_is_not_coded_has_the_names_it_had(kit):
    """Databases and shared stores that were written before there were codes are found."""
    header = dataclasses.replace(kit.HEADER, title="")
    assert header.family == "a32577b10e2e0a952e994e7d"
    assert header.context_id(np.arange(5)) == "df9be2c337ed710433f65b38"
    assert objects.group(header).startswith("5ee11fb8b4b421ea9821dbff")


def test_read_only(kit, tmp_path):
    path = tmp_path / "db"
    with pytest.raises(DatabaseError, match=r"there is no database at .*/db"):
        PoolStore(path, read_only=True)
    assert not path.exists()
    with PoolStore(path) as store:
        id = kit.put(store)
    with PoolStore(path, read_only=True) as store:
        assert store.check(id) == []
        for change in (lambda: store.remove(id), lambda: kit.put(store, 5)):
            with pytest.raises(DatabaseError, match="read_only=True; open it without"):
                change()


def test_closed(kit, store):
    id = kit.put(store)
    store.close()
    store.close()
    for use in (store.list, lambda: store.tokens(id), lambda: kit.put(store)):
        with pytest.raises(DatabaseError, match="is closed; open it again"):
            use()


def test_jax_arrays_and_views_are_written(kit, store):
    jnp = pytest.importorskip("jax.numpy")
    header = dataclasses.replace(kit.HEADER, dtype="bfloat16")
    tokens, kv = kit.make(300, header)
    strided = [(k.transpose(1, 0, 2).copy().transpose(1, 0, 2), jnp.asarray(v)) for k, v in kv]
    id = store.write(header, tokens.tolist(), lambda start: strided).id
    for layer, (k, v) in enumerate(kv):
        got_k, got_v = store.read_kv(id, layer)
        np.testing.assert_array_equal(got_k, k)
        np.testing.assert_array_equal(got_v, v)


def test_it_is_a_context_store(store):
    same: ContextStore = store  # checked by the type checker too
    assert same.list() == []


def test_few_layers_are_in_memory_at_once(kit, store):
    """Layers are on their way to the disk while the next one is asked for, but not many."""
    header = dataclasses.replace(kit.HEADER, num_layers=12)
    tokens, kv = kit.make(20, header)

    def layers(start):
        for layer, pair in enumerate(kv):
            files = [f for f in store.path.glob("segments/*/[kv].*") if f.stat().st_blocks]
            assert layer - 3 <= len(files) / 2 <= layer + 1
            yield pair

    store.write(header, tokens, layers)
    assert store.check(store.list()[0].id) == []


def test_equal_contexts_are_stored_once(kit, store):
    id = kit.put(store)
    again = dataclasses.replace(kit.HEADER, title="another")
    assert store.write(again, kit.make(20)[0], kit.must_not_run).id == id
    assert [r.header.title for r in store.list()] == [kit.HEADER.title]


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
@pytest.mark.parametrize("common", [0, 1, 15, 16, 17, 63, 64, 65, 100])
def test_equal_prefixes_are_stored_once_to_the_page(kit, store, whole, page_size, common):
    """What two contexts share is written once; the source is asked for the rest alone."""
    header = dataclasses.replace(kit.HEADER, page_size=page_size)
    tokens, kv = kit.make(100, header)
    store.write(header, tokens, kit.source(kv))
    rest, rest_kv = kit.make(40, header, seed=1)
    rest[0] = tokens[common] + 1 if common < 100 else rest[0]
    both = np.concatenate([tokens[:common], rest])
    both_kv = [
        tuple(np.concatenate([a[:, :common], b], axis=1) for a, b in zip(one, other, strict=True))
        for one, other in zip(kv, rest_kv, strict=True)
    ]
    starts = []
    record = store.write(header, both, kit.source(both_kv, starts))
    assert starts == [common // page_size * page_size]
    whole(store, record.id, both, both_kv)
    page_bytes = 2 * 3 * 2 * 8 * 4 * page_size
    assert store.stats().bytes_shared == common // page_size * page_bytes


@pytest.mark.parametrize("count", [1, 15, 16, 17, 99])
def test_a_prefix_of_a_stored_context_takes_no_page(kit, store, whole, count):
    """Its last page too is one that begins with the same tokens."""
    tokens, kv = kit.make(100)
    longer = store.write(kit.HEADER, tokens, kit.source(kv)).id
    before = store.stats()
    shorter = store.write(kit.HEADER, tokens[:count], kit.must_not_run).id
    whole(store, shorter, tokens[:count], [(k[:, :count], v[:, :count]) for k, v in kv])
    after = store.stats()
    assert after.bytes_free == before.bytes_free
    store.remove(longer)
    store.gc()
    whole(store, shorter, tokens[:count], [(k[:, :count], v[:, :count]) for k, v in kv])
    store.remove(shorter)
    store.gc()
    assert list((store.path / "segments").iterdir()) == []


def test_pages_made_by_a_plan_are_not_shared_as_exact(kit, store, whole):
    """Row 20, and its other side: where both were made in the same way, they are shared."""
    tokens, kv = kit.make(100)
    sparse = dataclasses.replace(kit.HEADER, origin=((40, "Tiles(0.9)"),))
    store.write(sparse, tokens, kit.source(kv))
    other_kv = kit.make(100, seed=1)[1]
    starts = []
    exact = store.write(kit.HEADER, tokens, kit.source(other_kv, starts)).id
    same_way = dataclasses.replace(sparse, origin=((40, "Tiles(0.9)"), (90, "Window()")))
    store.write(same_way, tokens, kit.source(other_kv, starts))
    assert starts == [32, 80]  # the page in which the origins part is written anew
    assert store.check(exact) == []
    np.testing.assert_array_equal(store.read_kv(exact, 1)[1][:, :32], kv[1][1][:, :32])
    np.testing.assert_array_equal(store.read_kv(exact, 1)[1][:, 32:], other_kv[1][1][:, 32:])


def test_a_name_that_two_contexts_share_never_answers_for_the_other(kit, store, whole, monkeypatch):
    """Row 13: were all digests equal, tokens would still be compared, and nothing be mixed up."""
    monkeypatch.setattr("alaya_jax.storage.identity.digest", lambda *parts: "0" * 24)
    tokens, kv = kit.make(50)
    id = store.write(kit.HEADER, tokens, kit.source(kv)).id
    with pytest.raises(DatabaseError, match="the same name and other tokens"):
        kit.put(store, 50, seed=1)
    whole(store, id, tokens, kv)
    longer, longer_kv = kit.make(60, seed=2)
    monkeypatch.setattr("alaya_jax.storage.identity.digest", lambda *parts: "1" * 24)
    longer[:20] = tokens[:20]
    other = store.write(kit.HEADER, longer, kit.source(longer_kv)).id
    assert store.stats().bytes_shared == 2 * 3 * 2 * 8 * 4 * PAGE, "one page of 16 of 20 tokens"
    np.testing.assert_array_equal(store.read_kv(other, 0)[0][:, 16:], longer_kv[0][0][:, 16:])


def test_namespaces(kit, store):
    """Rows 14 and 15: another namespace shares nothing, however it is framed; the same one does."""
    ids = {
        name: kit.put(store, header=dataclasses.replace(kit.HEADER, namespace=name))
        for name in ("", "a", "a/b", "../a")
    }
    for name, id in ids.items():
        assert [r.id for r in store.list(name)] == [id]
        starts = []
        longer, kv = kit.make(40)
        longer[:20] = kit.make(20)[0]
        header = dataclasses.replace(kit.HEADER, namespace=name)
        store.remove(store.write(header, longer, kit.source(kv, starts)).id)
        assert starts == [16]
    assert store.list("b") == []
    assert {r.id for r in store.list()} == set(ids.values())
    assert store.stats().bytes_shared == 0
    assert len(list((store.path / "segments").iterdir())) == 1, "no path is made of a namespace"


def test_remove_gives_the_space_back(kit, store, whole):
    tokens, kv = kit.make(500)
    kept = kit.put(store, 5, seed=1)
    free = store.stats().bytes_free
    used = store.stats().bytes_on_disk
    id = store.write(kit.HEADER, tokens, kit.source(kv)).id
    k, _ = store.read_kv(id, 0)
    assert store.stats().bytes_on_disk >= used + kv[0][0].nbytes * 6
    store.remove(id)
    np.testing.assert_array_equal(k, kv[0][0])  # what was read is a copy
    assert [r.id for r in store.list()] == [kept]
    assert store.stats().bytes_free == free
    assert store.stats().bytes_on_disk <= used + (64 << 10)
    for use in (store.remove, store.tokens, store.check, lambda id: store.read_kv(id, 0)):
        with pytest.raises(ContextError, match=rf"no context '{id}' in .*; list\(\) names"):
            use(id)
    whole(store, kept, *kit.make(5, seed=1))


def test_a_pinned_context_stays(kit, store):
    id = kit.put(store)
    store.pin(id)
    assert [r.pinned for r in store.list()] == [True]
    with pytest.raises(ContextError, match="is pinned; unpin it first"):
        store.remove(id)
    with PoolStore(store.path) as other:
        assert [r.pinned for r in other.list()] == [True]
        other.pin(id, False)
    store.remove(id)
    assert store.list() == []


def test_interrupted_import_leaves_nothing(kit, store, whole):
    tokens, kv = kit.make(20)

    def layers(start):
        yield kv[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(kit.HEADER, tokens, layers)
    assert store.list() == []
    assert list((store.path / "segments").iterdir()) == []
    whole(store, store.write(kit.HEADER, tokens, kit.source(kv)).id, tokens, kv)


def test_a_segment_that_is_full_is_followed_by_another(kit, store, whole, monkeypatch):
    monkeypatch.setattr("alaya_jax.storage.placing.LEAST_PAGES", 8)
    made = [kit.make(n, seed=n) for n in (100, 30, 16 * 9, 60)]  # 7, 2, 9 and 4 pages
    ids = [store.write(kit.HEADER, t, kit.source(kv)).id for t, kv in made]
    assert len(list((store.path / "segments").iterdir())) == 3
    for id, (tokens, kv) in zip(ids, made, strict=True):
        whole(store, id, tokens, kv)
    # Six pages of the first are shared, and its segment has no room for two more.
    tokens, kv = kit.make(130, seed=100)
    tokens[:96] = made[0][0][:96]
    starts = []
    whole(store, store.write(kit.HEADER, tokens, kit.source(kv, starts)).id, tokens, kv)
    assert starts == [0]
    for id in ids:
        store.remove(id)
    assert store.gc().segments == 3


def test_pages_that_are_free_here_and_there_are_used(kit, store, whole, monkeypatch):
    monkeypatch.setattr("alaya_jax.storage.placing.LEAST_PAGES", 8)
    ids = [kit.put(store, 16, seed=i) for i in range(8)]
    for id in ids[::2]:
        store.remove(id)
    tokens, kv = kit.make(60, seed=20)
    id = store.write(kit.HEADER, tokens, kit.source(kv)).id
    _, entry = store._pool.entry(id)
    assert store._pool.catalogue.pages(entry, 8).slots.tolist() == [0, 2, 4, 6]
    whole(store, id, tokens, kv)
    with store.mapped(id) as mapped:
        mapped.verify(2, mapped.pages)
    for i, kept in list(enumerate(ids))[1::2]:
        whole(store, kept, *kit.make(16, seed=i))


def test_a_damaged_context_is_replaced_when_it_is_stored_again(kit, store, whole):
    """And lends nothing that is known to be damaged: neither to itself nor to others."""
    tokens, kv = kit.make(100)
    id = store.write(kit.HEADER, tokens, kit.source(kv)).id
    longer, longer_kv = kit.make(130, seed=1)
    longer[:100] = tokens
    other = store.write(kit.HEADER, longer, kit.source(longer_kv)).id
    kit.flip_page(store, id, layer=1, kind=0, token=40)
    for damaged in (id, other):
        with pytest.raises(ContextError, match="keys of tokens 32 to 47 of layer 1"):
            store.read_kv(damaged, 1)
    starts = []
    assert store.write(kit.HEADER, tokens, kit.source(kv, starts)).id == id
    assert starts == [32]
    whole(store, id, tokens, kv)
    assert store.check(other) != []
    assert store.write(kit.HEADER, longer, kit.source(longer_kv)).id == other
    assert store.check(other) == []
    assert len(store.list()) == 2


def test_what_one_store_does_another_sees(kit, store, whole):
    """Two in one process, as after a cell that was run twice; each sees what the other did."""
    with PoolStore(store.path) as other, PoolStore(store.path, read_only=True) as reader:
        before = reader.version(), other.version()
        tokens, kv = kit.make(60)
        id = store.write(kit.HEADER, tokens, kit.source(kv)).id
        assert reader.version() != before[0]
        assert other.version() != before[1]
        for each in (other, reader):
            whole(each, id, tokens, kv)
        assert other.write(kit.HEADER, tokens, kit.must_not_run).id == id
        kit.put(other, 30, seed=1)
        assert len(store.list()) == len(reader.list()) == 2
        other.remove(id)
        assert len(store.list()) == len(reader.list()) == 1
        with pytest.raises(ContextError, match="no context"):
            reader.read_kv(id, 0)


def test_threads_write_at_once(kit, store):
    """Four threads, two contexts: each is stored once and whole."""
    jobs = [kit.make(400), kit.make(400), kit.make(300), kit.make(300)]
    ids, barrier = [], threading.Barrier(len(jobs))

    def work(tokens, kv):
        barrier.wait()
        ids.append(store.write(kit.HEADER, tokens, kit.source(kv)).id)

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 4
    assert len(set(ids)) == 2
    assert {r.id for r in store.list()} == set(ids)
    assert all(store.check(id) == [] for id in ids)


@pytest.mark.parametrize(
    ("heads", "page_size", "dim"), [(2, 2, 2), (16, 16, 4), (4, 16, 16), (8, 8, 8), (3, 7, 3)]
)
def test_row_7_axes_of_equal_length_are_not_mixed_up(store, kit, whole, heads, page_size, dim):
    """Kind: shapes that are their own transposes; what is read has each number where it was."""
    header = dataclasses.replace(
        kit.HEADER, num_kv_heads=heads, page_size=page_size, head_dim=dim, num_layers=2
    )
    tokens, kv = kit.make(heads, header)
    id = store.write(header, tokens, kit.source(kv)).id
    whole(store, id, tokens, kv)
    with store.mapped(id) as mapped:
        for layer, pair in enumerate(kv):
            for half, want in zip(mapped.layer(layer), pair, strict=True):
                for token in range(heads):
                    page, at = mapped.pages[token // page_size], token % page_size
                    np.testing.assert_array_equal(half[:, page, at], want[:, token])
