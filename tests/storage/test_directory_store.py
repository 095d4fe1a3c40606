"""Contexts at rest: what is written comes back, and damage, crashes and rivals are noticed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from alaya_jax.errors import ContextError, DatabaseError, RequestError
from alaya_jax.storage import ContextHeader, ContextStore, DirectoryStore

HEADER = ContextHeader(
    fingerprint="f" * 64,
    dtype="float32",
    num_layers=3,
    num_kv_heads=2,
    head_dim=8,
    page_size=16,
    title="a title with ümlaut",
)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def make(count, header=HEADER, seed=0):
    """Tokens [n] and kv, a list of L pairs of [K, n, D]."""
    rng = np.random.default_rng(seed)
    shape = (header.num_kv_heads, count, header.head_dim)
    kv = [
        tuple(rng.normal(size=shape).astype(DTYPES[header.dtype]) for _ in "kv")
        for _ in range(header.num_layers)
    ]
    return rng.integers(0, 1000, count).astype(np.int32), kv


@pytest.fixture
def store(tmp_path):
    with DirectoryStore(tmp_path / "db") as store:
        yield store


def layer_file(store, id, layer):
    return store.path / "contexts" / id / f"layer_{layer:03d}.kv"


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def run_python(code, *arguments, **popen):
    """Another process of this Python; `code` runs after the imports."""
    head = """
        import os, sys, time
        import numpy as np
        from alaya_jax.errors import DatabaseError
        from alaya_jax.storage import ContextHeader, DirectoryStore
        path = sys.argv[1]
    """
    code = textwrap.dedent(head) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        **popen,
    )


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 255, 256, 257, 700])
def test_round_trip(tmp_path, dtype, count):
    header = dataclasses.replace(HEADER, dtype=dtype, namespace="n")
    tokens, kv = make(count, header)
    steps = []
    with DirectoryStore(tmp_path / "db") as store:
        id = store.write(header, tokens, iter(kv), lambda done, of: steps.append((done, of))).id
    assert steps == [(1, 3), (2, 3), (3, 3)]

    with DirectoryStore(tmp_path / "db") as store:
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


def test_jax_arrays_and_views_are_written(store):
    jnp = pytest.importorskip("jax.numpy")
    header = dataclasses.replace(HEADER, dtype="bfloat16")
    tokens, kv = make(300, header)
    strided = [(k.transpose(1, 0, 2).copy().transpose(1, 0, 2), jnp.asarray(v)) for k, v in kv]
    id = store.write(header, tokens.tolist(), strided).id
    for layer, (k, v) in enumerate(kv):
        got_k, got_v = store.read_kv(id, layer)
        np.testing.assert_array_equal(got_k, k)
        np.testing.assert_array_equal(got_v, v)


def test_it_is_a_context_store(store):
    same: ContextStore = store  # checked by the type checker too
    assert same.list() == []


def test_layers_are_taken_one_by_one(store):
    """RAM stays bounded: a layer is on disk before the next one is asked for."""
    tokens, kv = make(20)

    def layers():
        for layer, pair in enumerate(kv):
            written = list(store.path.glob("contexts/.tmp-*/layer_*.kv"))
            assert len(written) == layer
            assert all(f.stat().st_size == 2 * pair[0].nbytes for f in written)
            yield pair

    store.write(HEADER, tokens, layers())
    assert len(store.list()) == 1


def test_equal_contexts_are_stored_once(store):
    tokens, kv = make(20)
    id = store.write(HEADER, tokens, kv).id

    def must_not_run():
        raise AssertionError
        yield

    again = dataclasses.replace(HEADER, title="another")
    assert store.write(again, tokens, must_not_run()).id == id
    assert [r.header.title for r in store.list()] == [HEADER.title]


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "g"},
        {"namespace": "other"},
        {"dtype": "float16"},
        {"page_size": 32},
        {"origin": ((3, "Window()"),)},
    ],
    ids=str,
)
def test_what_differs_is_stored_apart(store, change):
    tokens, kv = make(20)
    other = dataclasses.replace(HEADER, **change)
    ids = [store.write(HEADER, tokens, kv).id, store.write(other, tokens, make(20, other)[1]).id]
    assert len(set(ids)) == 2
    assert [r.id for r in store.list()] == ids  # oldest first
    assert [r.header for r in store.list()] == [HEADER, other]


def test_namespaces(store):
    tokens, kv = make(20)
    ids = {
        name: store.write(dataclasses.replace(HEADER, namespace=name), tokens, kv).id
        for name in ("", "a", "a/b", "../a")
    }
    for name, id in ids.items():
        assert [r.id for r in store.list(name)] == [id]
    assert store.list("b") == []
    assert {r.id for r in store.list()} == set(ids.values())
    assert {p.name for p in (store.path / "contexts").iterdir()} == set(ids.values())


def test_remove(store):
    tokens, kv = make(20)
    id, kept = store.write(HEADER, tokens, kv).id, store.write(HEADER, tokens[:5], make(5)[1]).id
    k, _ = store.read_kv(id, 0)
    store.remove(id)
    np.testing.assert_array_equal(k, kv[0][0])  # a mapped file lives until it is let go
    assert [r.id for r in store.list()] == [kept]
    assert [p.name for p in (store.path / "contexts").iterdir()] == [kept]
    for use in (store.remove, store.tokens, store.check, lambda id: store.read_kv(id, 0)):
        with pytest.raises(ContextError, match=rf"no context '{id}' in .*; list\(\) names"):
            use(id)


@pytest.mark.parametrize(("layer", "start", "stop"), [(3, 0, 1), (-1, 0, 1), (0, 0, 21), (0, 5, 4)])
def test_reading_outside(store, layer, start, stop):
    id = store.write(HEADER, *make(20)).id
    with pytest.raises(RequestError, match="has layers 0 to 2 and 20 tokens"):
        store.read_kv(id, layer, start, stop)


TOKENS, KV = make(20)
WRONG = {
    "fewer layers": (TOKENS, KV[:2], "kv ended after 2 layers; the header says 3"),
    "more layers": (TOKENS, KV + KV[:1], "goes on after the 3 layers"),
    "fewer tokens": (TOKENS, make(19)[1], r"k of layer 0 is float32 \[2, 19, 8\]"),
    "dtype": (TOKENS, [(k, v.astype(np.float16)) for k, v in KV], "v of layer 0 is float16"),
    "triples": (TOKENS, [(k, v, v) for k, v in KV], "layer 0 is no pair"),
    "no tokens": (TOKENS[:0], KV, r"tokens are int32 \[0\]"),
    "floats": (TOKENS * 1.0, KV, r"tokens are float64 \[20\]"),
    "two axes": (TOKENS[None], KV, r"tokens are int32 \[1, 20\]"),
    "negative": (TOKENS - 5000, KV, "token ids reach from -"),
    "too large": (TOKENS.astype(np.int64) + 2**31, KV, "use 0 to 2"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_refused_and_leaves_nothing(store, wrong):
    tokens, kv, message = WRONG[wrong]
    with pytest.raises(RequestError, match=message):
        store.write(HEADER, tokens, kv)
    assert store.list() == []
    assert list((store.path / "contexts").iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [{"dtype": "int8"}, {"num_layers": 0}, {"head_dim": 2.0}, {"namespace": None}],
    ids=str,
)
def test_wrong_header(change):
    with pytest.raises(RequestError, match=f"context: {next(iter(change))}="):
        dataclasses.replace(HEADER, **change)


def test_interrupted_import_leaves_nothing(store):
    tokens, kv = make(20)

    def layers():
        yield kv[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(HEADER, tokens, layers())
    assert list((store.path / "contexts").iterdir()) == []
    assert store.tokens(store.write(HEADER, tokens, kv).id).size == 20


@pytest.mark.smoke
def test_killed_in_the_middle_of_a_write(tmp_path):
    code = """
        header = ContextHeader(fingerprint="f", dtype="float32", num_layers=3, num_kv_heads=2,
                               head_dim=8, page_size=16)
        def kv():
            for layer in range(3):
                if layer == 2:
                    print("two layers written", flush=True)
                    time.sleep(60)
                yield np.zeros((2, 20, 8), np.float32), np.zeros((2, 20, 8), np.float32)
        DirectoryStore(path).write(header, np.arange(20), kv())
    """
    path = tmp_path / "db"
    with run_python(code, path) as process:
        assert process.stdout.readline() == "two layers written\n"
        (left,) = (path / "contexts").iterdir()
        assert (left / "layer_001.kv").exists()
        with pytest.raises(DatabaseError, match=f"for writing in process {process.pid} since 20"):
            DirectoryStore(path)
        assert left.exists()  # its owner lives
        process.send_signal(signal.SIGKILL)
        process.wait()
    with DirectoryStore(path, read_only=True) as store:
        assert store.list() == []
        assert left.exists()  # a reader changes nothing
    with DirectoryStore(path) as store:
        assert store.list() == []
        assert list((path / "contexts").iterdir()) == []
        id = store.write(HEADER, *make(20)).id
        assert store.check(id) == []


@pytest.mark.parametrize("half", [0, 1])
def test_a_flipped_bit_is_found_where_it_is(store, half):
    tokens, kv = make(1000)
    id = store.write(HEADER, tokens, kv).id
    token_bytes = 2 * 8 * 4
    flip(layer_file(store, id, 1), (half * 1000 + 600) * token_bytes + 5)
    what = (
        rf"context {id} in .*/db is damaged: the {('keys', 'values')[half]} of tokens 512 to 767 "
        r"of layer 1 \(layer_001.kv\) do not match their checksum; remove it and import it again"
    )
    for start, stop in [(0, None), (600, 601), (700, 1000), (512, 513)]:
        with pytest.raises(ContextError, match=what):
            store.read_kv(id, 1, start, stop)
    for start, stop in [(0, 512), (768, 1000), (600, 600)]:  # what is not read is not verified
        np.testing.assert_array_equal(store.read_kv(id, 1, start, stop)[0], kv[1][0][:, start:stop])
    store.read_kv(id, 0)
    (problem,) = store.check(id)
    assert "tokens 512 to 767 of layer 1" in problem


@pytest.mark.parametrize("name", ["tokens.npy", "checksums.npy"])
def test_a_flipped_bit_in_a_small_file(store, name):
    id = store.write(HEADER, *make(1000)).id
    flip(store.path / "contexts" / id / name, -1)
    use = store.tokens if name == "tokens.npy" else lambda id: store.read_kv(id, 0)
    with pytest.raises(ContextError, match=f"{name} does not match its checksum; remove"):
        use(id)
    assert len(store.check(id)) == 1


def test_truncated_under_an_open_store(store):
    id = store.write(HEADER, *make(1000)).id
    path = layer_file(store, id, 2)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ContextError, match=r"layer_002.kv cannot be mapped"):
        store.read_kv(id, 2)
    assert len(store.check(id)) == 1


def edit_meta(directory, **changes):
    path = directory / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "no meta": (lambda d: (d / "meta.json").unlink(), "meta.json cannot be read"),
    "empty meta": (lambda d: (d / "meta.json").write_bytes(b""), "meta.json cannot be understood"),
    "meta of another kind": (lambda d: (d / "meta.json").write_text("[]"), "cannot be understood"),
    "binary meta": (lambda d: (d / "meta.json").write_bytes(b"\xff\x00"), "cannot be understood"),
    "edited meta": (lambda d: edit_meta(d, num_tokens=999), "does not match its checksum"),
    "newer version": (lambda d: edit_meta(d, version=7), "format version 7, .* reads version 2"),
    "short layer": (lambda d: os.truncate(d / "layer_001.kv", 100), "layer_001.kv has 100 bytes"),
    "empty layer": (lambda d: os.truncate(d / "layer_001.kv", 0), "layer_001.kv has 0 bytes"),
    "no layer": (lambda d: (d / "layer_002.kv").unlink(), "layer_002.kv is missing"),
    "no tokens": (lambda d: (d / "tokens.npy").unlink(), "tokens.npy is missing"),
    "short checksums": (lambda d: os.truncate(d / "checksums.npy", 9), "has 9 bytes instead of"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_listed_and_the_rest_still_works(tmp_path, damage):
    hurt, message = DAMAGE[damage]
    tokens, kv = make(300)
    with DirectoryStore(tmp_path / "db") as store:
        bad, good = (
            store.write(HEADER, tokens, kv).id,
            store.write(HEADER, tokens[:5], make(5)[1]).id,
        )
    hurt(store.path / "contexts" / bad)

    with DirectoryStore(tmp_path / "db") as store:
        records = {r.id: r for r in store.list()}
        assert records[good].problem is None
        assert store.check(good) == []
        problem = records[bad].problem
        assert bad in problem
        assert "remove it and import it again" in problem
        for use in (store.tokens, lambda id: store.read_kv(id, 0)):
            with pytest.raises(ContextError, match=message):
                use(bad)
        assert store.check(bad) == [problem]
        assert records[bad].nbytes in (0, records[good].nbytes * 60)
        # The way out that the message names; importing it again also works without removing it.
        if damage == "no meta":
            store.remove(bad)
        assert store.write(HEADER, tokens, kv).id == bad
        assert store.check(bad) == []
        assert len(store.list()) == 2


def test_a_context_moved_under_another_name(tmp_path):
    with DirectoryStore(tmp_path / "db") as store:
        id = store.write(HEADER, *make(20)).id
    (store.path / "contexts" / id).rename(store.path / "contexts" / "renamed")
    with DirectoryStore(tmp_path / "db") as store:
        assert "or its directory" in store.list()[0].problem
        store.remove("renamed")
        assert store.list() == []


def test_lock_between_processes(tmp_path):
    code = """
        store = DirectoryStore(path, read_only=sys.argv[2] == "reader")
        print("open", flush=True)
        sys.stdin.read()
        store.close()
        print("closed", flush=True)
        time.sleep(60)
    """
    path = tmp_path / "db"
    DirectoryStore(path).close()
    with run_python(code, path, "writer", stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "open\n"
        for read_only in (False, True):
            message = (
                rf"database .*/db is open for writing in process {process.pid} since .*; close"
            )
            with pytest.raises(DatabaseError, match=message):
                DirectoryStore(path, read_only=read_only)
        process.stdin.close()
        assert process.stdout.readline() == "closed\n"
        DirectoryStore(path).close()  # close() lets go while the process lives on
        process.kill()
    with run_python(code, path, "reader", stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(DatabaseError, match="open with read_only=True in another process"):
            DirectoryStore(path)
        DirectoryStore(path, read_only=True).close()
        process.kill()
        process.wait()
        DirectoryStore(path).close()  # death lets go too


def test_lock_within_a_process(tmp_path):
    path = tmp_path / "db"
    store = DirectoryStore(path)
    with pytest.raises(
        DatabaseError, match=f"already open for writing in this process {os.getpid()}"
    ):
        DirectoryStore(path)
    del store  # a notebook that runs a cell again
    with DirectoryStore(path):
        pass
    with DirectoryStore(path, read_only=True), DirectoryStore(path, read_only=True):
        pass


def test_a_failed_open_lets_the_lock_go(tmp_path):
    path = tmp_path / "db"
    DirectoryStore(path).close()
    mark = path / "alaya_db.json"
    text = mark.read_text()
    mark.write_text(text.replace("1", "2"))
    with pytest.raises(DatabaseError, match=r"alaya_db.json says .*'version': 2.* use the release"):
        DirectoryStore(path)
    mark.write_text(text)
    DirectoryStore(path).close()


def test_read_only(tmp_path):
    path = tmp_path / "db"
    with pytest.raises(DatabaseError, match=r"there is no database at .*/db"):
        DirectoryStore(path, read_only=True)
    assert not path.exists()
    with DirectoryStore(path) as store:
        id = store.write(HEADER, *make(20)).id
    with DirectoryStore(path, read_only=True) as store:
        assert store.check(id) == []
        for change in (lambda: store.remove(id), lambda: store.write(HEADER, *make(5))):
            with pytest.raises(DatabaseError, match="read_only=True; open it without"):
                change()


def test_closed(store):
    id = store.write(HEADER, *make(20)).id
    store.close()
    store.close()
    for use in (store.list, lambda: store.tokens(id), lambda: store.write(HEADER, *make(20))):
        with pytest.raises(DatabaseError, match="is closed; open it again"):
            use()


def test_paths_that_are_no_database(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DatabaseError, match="/file is a file; give the path of a directory"):
        DirectoryStore(file)
    with pytest.raises(
        DatabaseError, match=r"cannot open a database at .*/file/db: Not a directory"
    ):
        DirectoryStore(file / "db")
    with pytest.raises(DatabaseError, match="holds other files and is no database"):
        DirectoryStore(tmp_path)
    mine = tmp_path / "mine"
    (mine / "contexts" / "chapter 1").mkdir(parents=True)
    with pytest.raises(DatabaseError, match="holds other files and is no database"):
        DirectoryStore(mine)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["chapter 1", "contexts", "file", "mine"]
    (tmp_path / "empty").mkdir()
    DirectoryStore(tmp_path / "empty").close()
    DirectoryStore(tmp_path / "made" / "with" / "parents").close()


# Root may write everywhere, so the process gives its rights away first (a user has none to give).
AS_NOBODY = """
    import mmap  # what is imported later may lie where nobody can read
    if os.getuid() == 0:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
    try:
        store = DirectoryStore(path, read_only=sys.argv[2] == "reader")
        print(len(store.list()), "context", store.check(store.list()[0].id))
    except DatabaseError as error:
        print(error)
"""


def test_a_path_that_may_not_be_written():
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to other users
        Path(name).chmod(0o755)
        path = Path(name, "db")
        with DirectoryStore(path) as store:
            store.write(HEADER, *make(20))
        closed = [path, path / "contexts", path / "lock"]
        modes = [p.stat().st_mode for p in closed]
        for p in closed:
            p.chmod(0o555 if p.is_dir() else 0o444)
        try:
            said = {}
            for place, kind in [(path, "writer"), (path / "new", "writer"), (path, "reader")]:
                with run_python(AS_NOBODY, place, kind) as process:
                    said[place, kind] = process.stdout.read()
        finally:
            for p, mode in zip(closed, modes, strict=True):
                p.chmod(mode)
    denied = "cannot open a database at {}: Permission denied; give the path of a directory that"
    assert said[path, "writer"].startswith(denied.format(path))
    assert said[path / "new", "writer"].startswith(denied.format(path / "new"))
    assert said[path, "reader"] == "1 context []\n"


def test_a_disk_that_fails_in_the_middle(tmp_path):
    code = """
        import resource
        store = DirectoryStore(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        header = ContextHeader(fingerprint="f", dtype="float32", num_layers=2, num_kv_heads=2,
                               head_dim=64, page_size=16)
        layer = [np.zeros((2, 300, 64), np.float32)] * 2
        try:
            store.write(header, np.arange(300), [layer] * 2)
        except DatabaseError as error:
            print(error, len(store.list()), os.listdir(store.path / "contexts"))
    """
    with run_python(code, tmp_path / "db") as process:
        said = process.stdout.read()
    assert "File too large; nothing of it was kept" in said
    assert said.endswith("0 []\n")


def test_a_full_disk_is_known_before(store, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DatabaseError, match=r"20 tokens needs 7680 bytes, and .*/db has 1000 free"):
        store.write(HEADER, make(20)[0], [])


def test_threads_write_at_once(store):
    """Four threads, two contexts: each is stored once and whole."""
    jobs = [make(400), make(400), make(300), make(300)]
    ids, barrier = [], threading.Barrier(len(jobs))

    def work(tokens, kv):
        barrier.wait()
        ids.append(store.write(HEADER, tokens, kv).id)

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 4
    assert (
        {r.id for r in store.list()}
        == set(ids)
        == {p.name for p in (store.path / "contexts").iterdir()}
    )
    assert len(set(ids)) == 2
    assert all(store.check(id) == [] for id in ids)
