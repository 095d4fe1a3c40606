"""Contexts that move between databases through a shared store. Rows are of the catalogue of faults
of caches in docs/storage.md.
"""

import hashlib
import json
import threading

import numpy as np
import pytest

from alaya_jax.errors import ContextError, DatabaseError, RemoteError, RequestError
from alaya_jax.storage import objects
from alaya_jax.storage.remote import RemoteContexts

GRAPH = {"degree": 4, "alpha": 1.5}


@pytest.fixture(params=["memory", "file"])
def place(request, watched, tmp_path):
    return watched(None if request.param == "memory" else f"file://{tmp_path}/shared")


def graph(layers=3):
    return [
        {"neighbours": np.arange(24, dtype=np.int32).reshape(2, 3, 4) + i} for i in range(layers)
    ]


def damage(place, key, change):
    """Writes over an object what `change` makes of it."""
    found = place.inner.read(key)
    assert place.inner.replace(key, change(bytearray(found.data)), found.version)


def flipped(at):
    def change(data):
        data[at] ^= 0x10
        return bytes(data)

    return change


@pytest.mark.smoke
@pytest.mark.parametrize("n", [1, 255, 256, 257, 700])
def test_a_context_arrives_as_it_was(place, open_store, make, same, header, n):
    here, there = open_store(), open_store("there")
    tokens, kv = make(n)
    id = here.write(header, tokens, kv).id
    here.write_index(id, "graph", GRAPH, graph())
    done = []
    pushed = RemoteContexts(place).push(here, id, advance=done.append)
    assert (pushed.chunks, pushed.indexes) == (-(-n // 256), ("graph",))
    assert sum(done) == here.list()[0].nbytes

    remote = RemoteContexts(place)
    (moved,) = remote.contexts()
    assert (moved.id, moved.header, moved.num_tokens) == (id, header, n)
    assert remote.problems() == []
    done = []
    pulled = remote.pull(there, moved, advance=done.append)
    assert pulled.record.id == id
    assert pulled.chunks == pushed.chunks
    assert sum(done) == moved.nbytes
    same(there, id, tokens, kv)
    assert remote.pull_indexes(there, moved) == ["graph"]
    assert dict(there.indexes(id)["graph"].settings) == GRAPH
    for layer, arrays in enumerate(graph()):
        found = there.read_index(id, "graph", layer)["neighbours"]
        np.testing.assert_array_equal(found, arrays["neighbours"], strict=True)
    assert there.list()[0].header.title == header.title


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_every_dtype_moves(watched, open_store, make, same, kit, header, dtype):
    header = kit.stored_in(dtype, header)
    here, there = open_store(), open_store("there")
    tokens, kv = make(300, header)
    remote = RemoteContexts(watched())
    id = here.write(header, tokens, kv).id
    remote.push(here, id)
    remote.pull(there, remote.contexts()[0])
    same(there, id, tokens, kv)


def test_an_equal_prefix_is_uploaded_once(place, open_store, make, header):
    here, remote = open_store(), RemoteContexts(place)
    tokens, kv = make(800)
    other_end, other_kv = make(np.concatenate([tokens[:600], tokens[:100]]))
    ids = [here.write(header, *pair).id for pair in ((tokens, kv), (other_end, other_kv))]
    assert [remote.push(here, id).chunks for id in ids] == [4, 1]
    assert place.chunks_put() == 5
    again = [remote.push(here, id) for id in ids]
    assert [(p.chunks, p.nbytes, p.indexes) for p in again] == [(0, 0, ())] * 2
    assert place.chunks_put() == 5


def test_a_pull_reads_only_what_is_missing(place, open_store, make, same, header):
    here, there, remote = open_store(), open_store("there"), RemoteContexts(place)
    long, kv = make(900)
    remote.push(here, here.write(header, long, kv).id)
    short = make(np.concatenate([long[:520], [1, 2, 3]]))
    there.write(header, *short)  # shares two chunks, and a part of the third
    place.read_keys.clear()
    pulled = remote.pull(there, remote.contexts()[0])
    assert pulled.chunks == place.chunks_read() == 2
    same(there, pulled.record.id, long, kv)


def test_what_is_here_is_not_read_again(place, open_store, make, header):
    here, remote = open_store(), RemoteContexts(place)
    tokens, kv = make(300)
    remote.push(here, here.write(header, tokens, kv).id)
    place.read_keys.clear()
    pulled = remote.pull(here, remote.contexts()[0])
    assert (pulled.chunks, place.chunks_read()) == (0, 0)


def test_what_is_damaged_here_gives_nothing(watched, open_store, make, kit, same, header):
    """Neither to the context that is pulled anew, nor to one that begins like it."""
    here, there, place = open_store(), open_store("there"), watched()
    remote = RemoteContexts(place)
    tokens, kv = make(600)
    longer = make(np.append(tokens, [3, 4]))
    ids = [here.write(header, *pair).id for pair in ((tokens, kv), longer)]
    for id in ids:
        remote.push(here, id)
    moved = {m.id: m for m in remote.contexts()}
    remote.pull(there, moved[ids[0]])
    there.pin(ids[0])
    kit.flip_page(there, ids[0], layer=1, kind=0, token=300)
    place.read_keys.clear()
    assert place.chunks_read() == 0
    assert remote.pull(there, moved[ids[0]]).chunks == 0  # nobody has looked yet
    assert remote.pull(there, moved[ids[1]]).record.id == ids[1]
    if there.check(ids[1]):  # it shares the damaged page, which is known now
        remote.pull(there, moved[ids[1]], anew=True)
    same(there, ids[1], *longer)
    assert there.check(ids[0]) != []
    assert remote.pull(there, moved[ids[0]], anew=True).record.pinned
    same(there, ids[0], tokens, kv)


def test_a_prefix_is_matched_and_pulled_in_whole_chunks(watched, open_store, make, same, header):
    here, there, remote = open_store(), open_store("there"), RemoteContexts(watched())
    tokens, kv = make(700)
    id = here.write(header, tokens, kv).id
    remote.push(here, id)

    def match(prompt):
        moved, shared = remote.match(header, np.asarray(prompt, np.int32))
        assert (moved is None) == (shared == 0)
        return shared

    assert match(tokens) == match([*tokens, 5]) == 700
    assert match(tokens[:699]) == match([*tokens[:699], 5, 5]) == 512
    assert match(tokens[:511]) == match([*tokens[:300], 5]) == 256
    assert match(tokens[:255]) == match([5, *tokens]) == 0

    (moved,) = remote.contexts()
    pulled = remote.pull(there, moved, 512)
    assert pulled.record.id != id
    assert pulled.record.header.title == "a title with ümlaut (first 512 tokens)"
    same(there, pulled.record.id, tokens[:512], kv)
    assert remote.pull(there, moved).chunks == 1  # the rest
    same(there, id, tokens, kv)
    with pytest.raises(RequestError, match="no whole chunks"):
        remote.pull(there, moved, 500)


def test_what_is_not_exact_is_shared_up_to_there(watched, open_store, make, same, header, other):
    """A context stored after a plan that leaves keys out is exact up to some token."""
    here, there, remote = open_store(), open_store("there"), RemoteContexts(watched())
    tokens, kv = make(700)
    sparse = other(origin=((300, "DIPR(beta=50)"),))
    assert remote.push(here, here.write(sparse, tokens, kv).id).chunks == 3
    assert remote.match(header, tokens)[1] == 256
    assert remote.match(header, tokens, exact=False)[1] == 700
    assert remote.push(here, here.write(header, tokens, kv).id).chunks == 2  # the first is exact
    moved, shared = remote.match(header, tokens)
    assert (moved.header.origin, shared) == ((), 700)
    (moved,) = [m for m in remote.contexts() if m.header.origin]
    pulled = remote.pull(there, moved, 256)
    assert pulled.record.header.origin == ()
    pulled = remote.pull(there, moved, 512)
    assert pulled.record.header.origin == sparse.origin


OTHERS = {
    "row 17, weights": {"fingerprint": "model-2"},
    "row 18, RoPE": {"fingerprint": "model-1-rope8192"},
    "row 19, dtype": {"dtype": "float16"},
    "row 19, page size": {"page_size": 8},
    "row 7, axes": {"num_layers": 2, "num_kv_heads": 3},
    "row 14, namespace": {"namespace": "other"},
}


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS.keys())
def test_rows_14_17_18_19_another_model_or_namespace_misses(
    watched, open_store, make, header, other, fields
):
    """Paired: the same hits, and of the other neither record nor chunk is found."""
    here, place = open_store(), watched()
    remote = RemoteContexts(place)
    tokens, kv = make(600)
    remote.push(here, here.write(header, tokens, kv).id)
    theirs = other(**fields)
    assert remote.match(header, tokens)[1] == 600
    assert remote.match(theirs, tokens) == (None, 0)
    assert [m.header for m in remote.contexts(header)] == [header]
    assert remote.contexts(theirs) == []
    there = open_store("there")
    pushed = remote.push(there, there.write(theirs, *make(tokens, theirs)).id)
    assert pushed.chunks == 3  # none is shared
    assert remote.match(theirs, tokens)[0].header == theirs
    assert remote.match(header, tokens)[0].header == header


def test_row_13_equal_hashes_serve_no_other_context(
    watched, open_store, make, same, header, monkeypatch
):
    """Every name is the same: tokens are compared, and what differs is refused."""
    monkeypatch.setattr(objects, "digest", lambda *parts: "0" * 64)
    here, there, place = open_store(), open_store("there"), watched()
    remote = RemoteContexts(place)
    tokens, kv = make(200)
    others = make(np.arange(200))
    id, other_id = here.write(header, tokens, kv).id, here.write(header, *others).id
    remote.push(here, id)
    with pytest.raises(ContextError, match="holds other tokens"):
        remote.push(here, other_id)
    assert [m.id for m in RemoteContexts(place).contexts()] == [id]
    there.write(header, *others)  # has all names of the wanted one
    pulled = RemoteContexts(place).pull(there, remote.contexts()[0])
    assert pulled.chunks == 1
    same(there, id, tokens, kv)


def test_rows_6_and_21_damage_is_refused_by_name_and_leaves_nothing(
    place, open_store, make, header
):
    here, there, remote = open_store(), open_store("there"), RemoteContexts(place)
    tokens, kv = make(300)
    id = here.write(header, tokens, kv).id
    remote.push(here, id)
    (moved,) = remote.contexts()
    key = objects.chunk_key(moved.chunks[1])
    whole = place.read(key).data
    heading = objects.chunk_heading(header, 256, tokens[256:])
    positions = [0, 20, len(heading) - 1, len(heading), len(whole) // 2, len(whole) - 1]
    changes = [flipped(at) for at in positions]
    changes += [lambda data, at=at: bytes(data[:at]) for at in (0, 1, *positions[1:])]
    changes += [lambda data: bytes(data) + b"\0"]
    for change in changes:
        damage(place, key, change)
        with pytest.raises(ContextError, match=f"{key}.*push its context again") as error:
            remote.pull(there, moved)
        assert place.where in str(error.value)
        assert there.list() == []
        damage(place, key, lambda _: whole)
    assert remote.pull(there, moved).record.id == id
    assert [p.name for p in there.path.rglob("*") if p.name.startswith((".tmp", "tmp"))] == []


def test_a_swapped_chunk_is_not_taken(watched, open_store, make, header, other):
    """A chunk that is whole, but of other tokens, another place or another model."""
    here, there, place = open_store(), open_store("there"), watched()
    remote = RemoteContexts(place)
    tokens, kv = make(600)
    id = here.write(header, tokens, kv).id
    remote.push(here, id)
    moved = remote.contexts()[0]
    changed = make(np.concatenate([tokens[:256], tokens[257:], [0]]))
    remote.push(here, here.write(header, *changed).id)
    fine_tuned = other(fingerprint="model-2")
    remote.push(here, here.write(fine_tuned, *make(tokens, fine_tuned)).id)
    by_id = {m.header.fingerprint if m.id != id else id: m for m in remote.contexts()}
    key = objects.chunk_key(moved.chunks[1])
    whole = place.read(key).data
    swaps = [by_id["model-1"].chunks[1], moved.chunks[0], by_id["model-2"].chunks[1]]
    for name in swaps:
        damage(place, key, lambda _, name=name: place.read(objects.chunk_key(name)).data)
        with pytest.raises(ContextError, match=key):
            remote.pull(there, moved)
        assert there.list() == []
    damage(place, key, lambda _: whole)
    remote.pull(there, moved)


def test_row_24_a_record_whose_chunks_are_gone(place, open_store, make, same, header):
    here, there, remote = open_store(), open_store("there"), RemoteContexts(place)
    tokens, kv = make(600)
    id = here.write(header, tokens, kv).id
    remote.push(here, id)
    (moved,) = remote.contexts()
    key = objects.chunk_key(moved.chunks[1])
    place.inner._kv.write(key, None).result()
    with pytest.raises(ContextError, match=f"{key}: it is gone.*--repair"):
        remote.pull(there, moved)
    assert there.list() == []
    assert remote.push(here, id).chunks == 0  # a record vouches for its chunks
    assert remote.push(here, id, repair=True).chunks == 1
    remote.pull(there, moved)
    same(there, id, tokens, kv)


def test_repair_writes_over_what_is_damaged(place, open_store, make, same, header):
    here, there, remote = open_store(), open_store("there"), RemoteContexts(place)
    tokens, kv = make(600)
    id = here.write(header, tokens, kv).id
    here.write_index(id, "graph", GRAPH, graph())
    remote.push(here, id)
    (moved,) = remote.contexts()
    (record,) = place.keys("contexts/")
    (index,) = place.keys("indexes/")
    keys = [*map(objects.chunk_key, moved.chunks[:2]), record, index, place.keys("pieces/")[0]]
    for key, at in zip(keys, (5, -40, 60, 70, 3), strict=True):
        damage(place, key, flipped(at))
    remote = RemoteContexts(place)
    assert remote.contexts() == []
    (problem,) = remote.problems()
    assert record in problem
    assert remote.push(here, id, repair=True).chunks == 2
    assert remote.problems() == []
    remote.pull(there, remote.contexts()[0])
    remote.pull_indexes(there, remote.contexts()[0])
    same(there, id, tokens, kv)


def test_a_damaged_index_is_no_damage_of_its_context(watched, open_store, make, same, header):
    here, there, place = open_store(), open_store("there"), watched()
    remote = RemoteContexts(place)
    tokens, kv = make(100)
    id = here.write(header, tokens, kv).id
    here.write_index(id, "graph", GRAPH, graph())
    remote.push(here, id)
    (moved,) = remote.contexts()
    remote.pull(there, moved)
    for key in (*place.keys("pieces/"), *place.keys("indexes/")):
        whole = place.read(key).data
        for change in (flipped(3), flipped(-1), lambda data: bytes(data[:-4]), lambda _: b""):
            damage(place, key, change)
            with pytest.raises(ContextError, match=f"{key}.*build"):
                remote.pull_indexes(there, moved)
            assert there.indexes(id) == {}
            damage(place, key, lambda _, whole=whole: whole)
    place.inner._kv.write(place.keys("pieces/")[0], None).result()
    with pytest.raises(ContextError, match="is gone"):
        remote.pull_indexes(there, moved)
    same(there, id, tokens, kv)


def test_an_index_of_other_settings_takes_the_place(watched, open_store, make, header):
    here, there, place = open_store(), open_store("there"), watched()
    remote = RemoteContexts(place)
    id = here.write(header, *make(100)).id
    here.write_index(id, "graph", GRAPH, graph())
    assert remote.push(here, id).indexes == ("graph",)
    here.write_index(id, "graph", GRAPH | {"degree": 8}, graph())
    assert remote.push(here, id).indexes == ("graph",)
    (moved,) = remote.contexts()
    remote.pull(there, moved)
    remote.pull_indexes(there, moved)
    assert there.indexes(id)["graph"].settings["degree"] == 8
    assert remote.pull_indexes(there, moved) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": [{"../../x": {"dtype": "<i4", "shape": [1], "pieces": ["0" * 64]}}]},
        {"layers": [{"n": {"dtype": "|O", "shape": [1], "pieces": ["0" * 64]}}]},
        {"layers": [{"n": {"dtype": "<i4", "shape": [1 << 39, 1 << 39], "pieces": ["0" * 64]}}]},
        {"layers": [{"n": {"dtype": "<i4", "shape": [-1], "pieces": ["0" * 64]}}]},
        {"layers": [{"n": {"dtype": "<i4", "shape": [1], "pieces": ["../../../etc/passwd"]}}]},
        {"layers": [{"n": {"dtype": "<i4", "shape": [1], "pieces": []}}]},
        {"layers": [{}] * 2000},
        {"layers": []},
        {"layers": 3},
        {"settings": 3},
        {"context": "0"},
        {"kind": "sketch"},
    ],
)
def test_hostile_indexes_are_refused(watched, open_store, make, header, fields):
    here, there, place = open_store(), open_store("there"), watched()
    remote = RemoteContexts(place)
    id = here.write(header, *make(100)).id
    here.write_index(id, "graph", GRAPH, graph())
    remote.push(here, id)
    (moved,) = remote.contexts()
    remote.pull(there, moved)
    (key,) = place.keys("indexes/")
    mark = b"alaya index 1\n"
    told = objects.read_plain(place.read(key).data, mark)
    damage(place, key, lambda _: objects.write_plain(mark, told | fields))
    with pytest.raises(ContextError, match="build the index again"):
        remote.pull_indexes(there, moved)


def test_a_record_that_lies_is_refused(watched, open_store, make, header):
    """Whole by its checksum, and yet of other tokens than its id says."""
    here, there, place = open_store(), open_store("there"), watched()
    remote = RemoteContexts(place)
    id = here.write(header, *make(300)).id
    remote.push(here, id)
    (moved,) = remote.contexts()
    (key,) = place.keys("contexts/")
    lie = objects.dataclasses.replace(moved, id="f" * 24)
    place.put(key.replace(id, "f" * 24), objects.write_record(lie))
    with pytest.raises(ContextError, match=f"its tokens are those of {id}"):
        remote.pull(there, lie)
    assert there.list() == []
    place.put(key.replace(id, "e" * 24), objects.write_record(moved))  # under another name
    assert {m.id for m in remote.contexts()} == {id, "f" * 24}
    assert any("of another model, namespace or context" in p for p in remote.problems())


def test_another_format_is_not_touched(watched, open_store, make, header):
    here, place = open_store(), watched()
    id = here.write(header, *make(10)).id
    place.put("alaya_remote.json", b'{"format": "alaya_jax contexts", "version": 2}\n')
    for act in (lambda r: r.push(here, id), lambda r: r.contexts()):
        with pytest.raises(RemoteError, match="not of this version"):
            act(RemoteContexts(place))
    assert place.keys("c") == []


def test_what_may_not_be_pushed(watched, open_store, make, other):
    """Contexts of unknown models, and contexts that are not there."""
    here, remote = open_store(), RemoteContexts(watched())
    old = other(fingerprint="f" * 64)  # of samples of the weights
    with pytest.raises(ContextError, match="whose keys these are is not known"):
        remote.push(here, here.write(old, *make(10, old)).id)
    with pytest.raises(ContextError, match="no context 'abc'"):
        remote.push(here, "abc")
    assert remote.contexts() == []


def test_two_pushes_at_once(place, open_store, make, same, header):
    """The first write of each waits for that of the other: both have seen that nothing is there."""
    stores, places = [open_store("a"), open_store("b")], [type(place)(place.inner) for _ in "ab"]
    tokens, kv = make(1200)
    ids = [store.write(header, tokens, kv).id for store in stores]
    both = threading.Barrier(2, timeout=30)
    pushed: list = [None, None]

    def push(i):
        first = threading.Lock()
        places[i].before_put = lambda key: first.acquire(blocking=False) and both.wait()
        pushed[i] = RemoteContexts(places[i]).push(stores[i], ids[i])

    threads = [threading.Thread(target=push, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pushed[0].moved.chunks == pushed[1].moved.chunks
    assert len(place.keys("chunks/")) == 5
    there, remote = open_store("there"), RemoteContexts(place)
    remote.pull(there, remote.contexts()[0])
    same(there, ids[0], tokens, kv)


def test_a_pull_while_the_pusher_writes(place, open_store, make, same, header):
    """Before each write of a push somebody looks: there is nothing, or all of it."""
    here, there = open_store(), open_store("there")
    tokens, kv = make(1000)
    seen = []

    def look(_):
        found = RemoteContexts(place)
        seen.append([found.match(header, tokens)[1], len(found.contexts()), found.problems()])

    place.before_put = look
    id = here.write(header, tokens, kv).id
    RemoteContexts(place).push(here, id)
    assert seen == [[0, 0, []]] * 6  # the mark, four chunks, the record
    remote = RemoteContexts(place)
    remote.pull(there, remote.contexts()[0])
    same(there, id, tokens, kv)


def test_a_full_disk_stores_nothing_and_says_so(watched, open_store, make, header, monkeypatch):
    here, there, remote = open_store(), open_store("there"), RemoteContexts(watched())
    remote.push(here, here.write(header, *make(300)).id)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(DatabaseError, match=r"No space left on device.*make room"):
        remote.pull(there, remote.contexts()[0])
    assert there.list() == []
    monkeypatch.undo()
    remote.pull(there, remote.contexts()[0])


def test_a_read_only_database_takes_nothing(watched, open_store, make, header):
    from alaya_jax.storage import PoolStore

    here, remote = open_store(), RemoteContexts(watched())
    remote.push(here, here.write(header, *make(30)).id)
    here.close()
    with (
        PoolStore(here.path, read_only=True) as store,
        pytest.raises(DatabaseError, match="read"),
    ):
        remote.pull(store, remote.contexts()[0])


def test_what_is_kept_are_plain_bytes(watched, open_store, make, header):
    """The format, read here without the library: a description by names, tokens, numbers."""
    here, place = open_store(), watched()
    tokens, kv = make(300)
    RemoteContexts(place).push(here, here.write(header, tokens, kv).id)
    (name,) = [k for k in place.keys("chunks/") if b'"first":256' in place.read(k).data]
    data = place.read(name).data
    assert data.startswith(b"alaya chunk 1\n")
    size = int.from_bytes(data[14:18], "little")
    told, rest = json.loads(data[18 : 18 + size]), data[18 + size : -32]
    axes = [["layer", 3], ["key_value", 2], ["kv_head", 2], ["token", 44], ["head_dim", 8]]
    assert told["axes"] == axes
    assert (told["dtype"], told["fingerprint"], told["first"]) == ("float32", "model-1", 256)
    np.testing.assert_array_equal(np.frombuffer(rest[: 44 * 4], "<i4"), tokens[256:])
    numbers = np.frombuffer(rest[44 * 4 :], "<f4").reshape([n for _, n in axes])
    for layer, pair in enumerate(kv):
        np.testing.assert_array_equal(numbers[layer], [x[:, 256:] for x in pair])
    assert hashlib.sha256(data[:-32]).digest() == data[-32:]
