"""Killed writers, failing writes and full disks: a context is whole or absent, no space is lost."""

import contextlib
import dataclasses
import errno
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from alaya_jax.errors import DatabaseError
from alaya_jax.storage import PoolStore
from alaya_jax.storage.catalogue import CatalogueFile

WRITER = """
    import random
    with PoolStore(path) as store:
        print("ready", flush=True)
        rng = random.Random(int(sys.argv[2]))
        for i in range(10_000):
            seed = rng.randrange(6)
            coded = seed % 2 and dict(store_dtype="int8", origin=((0, "storage in int8"),))
            own = dataclasses.replace(header, **(coded or {}))
            tokens, kv = make(100 + 100 * seed, seed, own)
            if rng.random() < 0.5:  # shares its first pages with another
                first, first_kv = make(100, 0, own)
                tokens[:90] = first[:90]
                kv = [tuple(np.concatenate([a[:, :90], b[:, 90:]], 1)
                            for a, b in zip(x, y, strict=True))
                      for x, y in zip(first_kv, kv, strict=True)]
            id = store.write(own, tokens, source(kv)).id
            if rng.random() < 0.3:
                store.write_index(id, "graph", {"i": i}, [{"near": np.arange(9)}] * 3)
            if rng.random() < 0.5:
                store.remove(id)
            if rng.random() < 0.1:
                store.gc()
"""


def expected(kit, header):
    """What each context that WRITER writes must hold, by id."""
    known = {}
    for seed in range(6):
        own = kit.stored_in("int8", header) if seed % 2 else header
        first, first_kv = kit.make(100, own, 0)
        for shares in (False, True):
            tokens, kv = kit.make(100 + 100 * seed, own, seed)
            if shares:
                tokens[:90] = first[:90]
                kv = [
                    tuple(
                        np.concatenate([a[:, :90], b[:, 90:]], 1) for a, b in zip(x, y, strict=True)
                    )
                    for x, y in zip(first_kv, kv, strict=True)
                ]
            known[own.context_id(tokens)] = tokens, kv
    return known


@pytest.mark.parametrize(
    "rounds", [10, pytest.param(200, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_row_25_killed_at_any_moment(tmp_path, kit, whole, rounds):
    """Kind: kill -9 of a process that stores, indexes, removes and collects, at random moments."""
    path, rng = tmp_path / "db", random.Random(0)
    header = dataclasses.replace(kit.HEADER, fingerprint="f", title="")
    known, seen = expected(kit, header), 0
    for i in range(10 * rounds):
        if i >= rounds and seen > rounds:  # on a busy machine a writer may be killed too early
            break
        with kit.run_python(WRITER, path, i) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.random() * 0.25)
            process.send_signal(signal.SIGKILL)
        with PoolStore(path, read_only=True) as store:
            assert store.check_catalogue() == []
            for record in store.list():
                assert record.problem is None
                whole(store, record.id, *known[record.id])
                seen += 1
    assert seen > rounds
    with PoolStore(path) as store:
        store.gc()
        found = store.stats()
        held = found.bytes_held - found.bytes_shared
        assert found.bytes_on_disk < held + found.bytes_indexes + (1 << 20)
        serials = {f"{e.serial:016x}" for e in store._pool.catalogue.snapshot().contexts.values()}
        assert {p.name for p in (path / "leases").iterdir()} == serials
        assert len(list((path / "indexes").iterdir())) == len(
            store._pool.catalogue.snapshot().indexes
        )
        for record in store.list():
            store.remove(record.id)
        assert store.gc().bytes_after < 1 << 18
        assert list((path / "segments").iterdir()) == []


FAILING = {
    "a page": "alaya_jax.storage.segment.write_at",
    "the disk's word": "os.fsync",
    "the row": "alaya_jax.storage.catalogue.Change.put_lists",
    "its making": "alaya_jax.storage.writing.Entry.new",
}


ONCE = ("the row", "its making")


@pytest.mark.parametrize(
    ("what", "nth"),
    [(what, n) for what in FAILING for n in (1, 2, 5, 7) if n == 1 or what not in ONCE],
)
def test_row_4_a_write_that_fails_leaves_nothing_to_be_found(
    store, kit, whole, monkeypatch, what, nth
):
    """Kind: fault injection, at each kind of write and at several of them."""
    kept = kit.put(store, 50, seed=1)
    before = store.stats()
    calls = 0
    module, _, name = FAILING[what].rpartition(".")
    owner = __import__(module.split(".")[0])
    for part in FAILING[what].split(".")[1:-1]:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    def failing(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments, **keywords)

    tokens, kv = kit.make(3000)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(DatabaseError, match="Input/output error; nothing of it was kept"):
            store.write(kit.HEADER, tokens, kit.source(kv))
    assert [r.id for r in store.list()] == [kept]
    after = store.stats()
    assert (after.bytes_held, after.bytes_free) == (before.bytes_held, before.bytes_free)
    assert after.bytes_on_disk <= before.bytes_on_disk + (128 << 10)  # of 577 kB
    whole(store, kept, *kit.make(50, seed=1))
    whole(store, store.write(kit.HEADER, tokens, kit.source(kv)).id, tokens, kv)


def test_a_file_that_may_not_grow(kit, tmp_path):
    code = """
        import resource
        store = PoolStore(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            tokens, kv = make(300)
            store.write(header, tokens, source(kv))
        except DatabaseError as error:
            print(error, len(store.list()), os.listdir(store.path / "segments"))
    """
    with kit.run_python(code, tmp_path / "db") as process:
        said = process.stdout.read()
    assert "File too large; nothing of it was kept" in said
    assert said.endswith("0 []\n")


def test_a_full_disk_is_known_before(store, kit, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(
            DatabaseError, match=r"20 tokens needs \d+ bytes more, and .*/db has 1000 free; remove"
        ):
            store.write(kit.HEADER, kit.make(20)[0], kit.must_not_run)
    kit.put(store)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


FILLING = """
    with PoolStore(path) as store:
        print("ready", flush=True)
        sys.stdin.readline()
        done = refused = 0
        for seed in range(100, 160):
            tokens, kv = make(300, seed)
            try:
                id = store.write(header, tokens, source(kv)).id
                assert store.check(id) == []
                done += 1
            except DatabaseError as error:
                assert "free" in str(error) or "nothing of it was kept" in str(error), error
                refused += 1
        print(done, refused, flush=True)
"""


def test_row_23_a_full_disk_and_two_processes(small_disk, kit, whole):
    """Kind: a small tmpfs that two processes fill; both say so, go on, and recover."""
    path = small_disk / "db"
    with PoolStore(path) as store:
        first = kit.put(store, 300)
        with kit.run_python(FILLING, path, stdin=subprocess.PIPE) as other:
            assert other.stdout.readline() == "ready\n"
            other.stdin.write("go\n")
            other.stdin.close()
            ids, refused = [], []
            for seed in range(1, 60):
                try:
                    ids.append(kit.put(store, 300, seed=seed))
                except DatabaseError as error:
                    refused.append(str(error))
            done, theirs = map(int, other.stdout.readline().split())
        assert done
        assert theirs
        assert ids
        assert refused
        assert any("bytes more, and" in text for text in refused), "with the numbers"
        assert len(store.list()) == 1 + done + len(ids)
        for record in store.list():
            assert store.check(record.id) == []
        whole(store, first, *kit.make(300))
        # A file of somebody else takes the rest: reading goes on, storing says why not.
        with contextlib.suppress(OSError), (small_disk / "other").open("wb") as file:
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)
                        file.flush()
        with pytest.raises(DatabaseError):
            kit.put(store, 300, seed=77)
        whole(store, first, *kit.make(300))
        # And when there is room again, storing works again.
        (small_disk / "other").unlink()
        for id in ids[:3]:
            store.remove(id)
        again = kit.put(store, 300, seed=77)
        whole(store, again, *kit.make(300, seed=77))
    with PoolStore(path) as store:
        assert all(store.check(record.id) == [] for record in store.list())


def test_a_catalogue_whose_maker_was_killed_is_finished(tmp_path):
    (tmp_path / "catalogue.sqlite").touch()
    CatalogueFile.create(tmp_path)
    catalogue = CatalogueFile(tmp_path, read_only=False)
    assert catalogue.check() == []
    assert catalogue.snapshot().there == {}
    catalogue.close()
    os.stat(tmp_path / "catalogue.sqlite")


def test_an_interrupt_when_all_is_done_takes_nothing_back(store, kit, whole, monkeypatch):
    """Ctrl-C between the commit and what follows it: the context is there, and whole."""
    real = CatalogueFile.changing

    @contextlib.contextmanager
    def interrupted(self):
        with real(self) as change:
            yield change
        raise KeyboardInterrupt

    tokens, kv = kit.make(100)
    with monkeypatch.context() as patch:
        patch.setattr(CatalogueFile, "changing", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.write(kit.HEADER, tokens, kit.source(kv))
    (record,) = store.list()
    whole(store, record.id, tokens, kv)
    with store.mapped(record.id) as mapped:
        mapped.verify(0, mapped.pages)
