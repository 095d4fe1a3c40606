"""Several processes on one database: they take turns, see each other, and every answer is right."""

import dataclasses
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from alaya_jax.errors import ContextError
from alaya_jax.storage import PoolStore

READER = """
    with PoolStore(path, read_only=sys.argv[2] == "reader") as store:
        (record,) = store.list()
        tokens, kv = make(100)
        with store.mapped(record.id) as mapped:
            print("reading", flush=True)
            sys.stdin.readline()
            for layer, pair in enumerate(kv):
                mapped.verify(layer, mapped.pages)
                for half, want in zip(mapped.layer(layer), pair, strict=True):
                    got = half[:, mapped.pages].reshape(2, -1, 8)[:, :100]
                    np.testing.assert_array_equal(got, want)
        print("right", flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def header(kit):
    return dataclasses.replace(kit.HEADER, fingerprint="f", title="")


@pytest.mark.smoke
@pytest.mark.parametrize("how", ["reader", "writer"])
def test_rows_8_9_and_24_a_reader_keeps_what_another_removes(tmp_path, kit, header, whole, how):
    """Kind: two processes, and others who want the space; for as long as it takes."""
    path = tmp_path / "db"
    with PoolStore(path) as store:
        id = kit.put(store, 100, header)
        with kit.run_python(READER, path, how, stdin=subprocess.PIPE) as process:
            assert process.stdout.readline() == "reading\n"
            store.remove(id)
            assert store.list() == []
            assert store.gc().in_use == 1
            others = [kit.put(store, 200, header, seed=i) for i in range(1, 6)]
            store.remove(others[0])
            store.gc()
            process.stdin.write("go on\n")
            process.stdin.flush()
            assert process.stdout.readline() == "right\n"
            assert store.gc().contexts == 1, "it was let go, though the process lives"
            process.stdin.close()
        assert process.returncode == 0
        for i, other in list(enumerate(others, 1))[1:]:
            whole(store, other, *kit.make(200, header, i))


def test_a_lease_ends_with_its_process(tmp_path, kit, header):
    path = tmp_path / "db"
    with PoolStore(path) as store:
        id = kit.put(store, 100, header)
        with kit.run_python(READER, path, "reader", stdin=subprocess.PIPE) as process:
            assert process.stdout.readline() == "reading\n"
            store.remove(id)
            assert store.stats().removed == 1
            process.kill()
        assert store.gc().contexts == 1


def test_row_22_what_was_stored_is_reused_after_a_restart(tmp_path, kit, header):
    """Kind: another process that stores a longer context computes only what is new."""
    code = """
        with PoolStore(path) as store:
            tokens, kv = make(100)
            store.write(header, tokens, source(kv))
    """
    with kit.run_python(code, tmp_path / "db") as process:
        pass
    assert process.returncode == 0
    tokens, kv = kit.make(130, header, seed=1)
    tokens[:100] = kit.make(100, header)[0]
    starts = []
    with PoolStore(tmp_path / "db") as store:
        store.write(header, tokens, kit.source(kv, starts))
        assert starts == [96]


def test_a_writer_that_waits_says_for_whom_and_readers_do_not_wait(tmp_path, kit, header, caplog):
    code = """
        def slowly(start):
            for layer, pair in enumerate(source(kv)(start)):
                print("layer", layer, flush=True)
                sys.stdin.readline()
                yield pair
        with PoolStore(path) as store:
            tokens, kv = make(100)
            store.write(header, tokens, slowly)
    """
    path = tmp_path / "db"
    with PoolStore(path) as store:
        first = kit.put(store, 50, header, seed=1)
        with kit.run_python(code, path, stdin=subprocess.PIPE) as process:
            assert process.stdout.readline() == "layer 0\n"
            begun = time.monotonic()
            assert store.check(first) == []
            store.remove(first)
            with PoolStore(path, read_only=True) as reader:
                assert reader.list() == []
            assert time.monotonic() - begun < 5
            waiting = subprocess.Popen(
                ["sh", "-c", "sleep 2; echo; echo; echo"], stdout=process.stdin
            )
            second = kit.put(store, 70, header, seed=2)
            waiting.wait()
            process.stdin.close()
        assert process.returncode == 0
        assert f"waiting for process {process.pid} since 20" in caplog.text
        assert {r.num_tokens for r in store.list()} == {100, 70}
        assert store.check(second) == []


def test_a_child_made_by_fork_goes_on(tmp_path, kit, header):
    """It reads, stores and removes, and so does its parent; a lease is held by both."""
    code = """
        store = PoolStore(path)
        tokens, kv = make(100)
        id = store.write(header, tokens, source(kv)).id
        mapped = store.mapped(id)
        child = os.fork()
        who = 1 if child else 2
        mine = store.write(header, make(60, who)[0], source(make(60, who)[1])).id
        assert store.check(mine) == [] and store.check(id) == []
        if not child:
            mapped.verify(0, mapped.pages)
            store.remove(id)
            mapped.close()
            store.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert sorted(r.num_tokens for r in store.list()) == [60, 60]
        assert store.gc().in_use == 1, "the parent still reads it"
        mapped.verify(1, mapped.pages)
        mapped.close()
        assert store.gc().contexts == 1
        print("right")
    """
    with kit.run_python(code, tmp_path / "db") as process:
        assert process.stdout.read() == "right\n"


AT_RANDOM = """
    import random
    rng, until = random.Random(int(sys.argv[2])), time.monotonic() + float(sys.argv[3])
    done, known = 0, {}
    def made(seed, count):
        tokens, kv = make(400, seed // 3)  # three of a family begin alike
        cut = 150 + 70 * (seed % 3)
        other, other_kv = make(400, 50 + seed)
        tokens[cut:] = other[cut:]
        kv = [tuple(np.concatenate([a[:, :cut], b[:, cut:]], 1) for a, b in zip(x, y, strict=True))
              for x, y in zip(kv, other_kv, strict=True)]
        return tokens[:count], [(k[:, :count], v[:, :count]) for k, v in kv]
    for seed in range(9):
        for count in (100, 250, 400):
            tokens, kv = made(seed, count)
            known[header.context_id(tokens)] = tokens, kv
    ids = list(known)
    with PoolStore(path) as store:
        while time.monotonic() < until:
            id = rng.choice(ids)
            tokens, kv = known[id]
            act = rng.random()
            try:
                if act < 0.4:
                    assert store.write(header, tokens, source(kv)).id == id
                elif act < 0.55:
                    store.remove(id)
                elif act < 0.6:
                    store.gc()
                elif act < 0.8:
                    layer = rng.randrange(3)
                    for got, want in zip(store.read_kv(id, layer), kv[layer], strict=True):
                        np.testing.assert_array_equal(got, want)
                else:
                    with store.mapped(id) as mapped:
                        layer = rng.randrange(3)
                        for _ in range(3):
                            mapped.verify(layer, mapped.pages)
                            for half, want in zip(mapped.layer(layer), kv[layer], strict=True):
                                got = half[:, mapped.pages].reshape(2, -1, 8)[:, :len(tokens)]
                                np.testing.assert_array_equal(got, want)
                            time.sleep(rng.random() * 0.01)
                done += 1
            except ContextError as error:
                assert str(error).startswith("no context"), error
    print(done)
"""


@pytest.mark.parametrize(
    "seconds", [2, pytest.param(60, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_rows_5_and_12_four_processes_at_random(tmp_path, kit, whole, header, seconds):
    """Kind: imports, removals, collections and reads at random; every answer is right, and the
    only error is that a context is not there.
    """
    path = tmp_path / "db"
    PoolStore(path).close()
    processes = [kit.run_python(AT_RANDOM, path, i, seconds) for i in range(4)]
    done = [int(process.communicate(timeout=seconds + 120)[0] or 0) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert min(done) > 5
    with PoolStore(path) as store:
        store.gc()
        assert store.check_catalogue() == []
        assert all(store.check(record.id) == [] for record in store.list())
        found = store.stats()
        assert found.removed == 0
        assert found.bytes_on_disk < found.bytes_held - found.bytes_shared + (2 << 20)


# Root may write everywhere, so the process gives its rights away first (a user has none to give).
AS_NOBODY = """
    import mmap  # what is imported later may lie where nobody can read
    if os.getuid() == 0:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
    try:
        with PoolStore(path, read_only=sys.argv[2] == "reader") as store:
            (record,) = store.list()
            with store.mapped(record.id) as mapped:
                mapped.verify(1, mapped.pages)
            print("1 context", store.check(record.id), store.version() == store.version())
    except DatabaseError as error:
        print(error)
"""


@pytest.mark.parametrize("closed", [True, False])
def test_a_path_that_may_not_be_written(kit, closed):
    """It can be read: beside a log that somebody else left, or without one."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to other users
        Path(name).chmod(0o755)
        path = Path(name, "db")
        store = PoolStore(path)
        kit.put(store)
        if closed:
            store.close()
        every = [path, *path.rglob("*")]
        modes = [p.stat().st_mode for p in every]
        for p in every:
            p.chmod(0o555 if p.is_dir() else 0o444)
        try:
            said = {}
            for place, kind in [(path, "writer"), (path / "new", "writer"), (path, "reader")]:
                with kit.run_python(AS_NOBODY, place, kind) as process:
                    said[place, kind] = process.stdout.read()
        finally:
            for p, mode in zip(every, modes, strict=True):
                p.chmod(mode)
            store.close()
    denied = "cannot open a database at {}: Permission denied; give the path of a directory that"
    assert said[path, "writer"].startswith(denied.format(path))
    assert said[path / "new", "writer"].startswith(denied.format(path / "new"))
    assert said[path, "reader"] == "1 context [] True\n"


def test_a_context_that_is_removed_while_it_is_asked_for(store, kit):
    """Row 12: it is there or it is not; another that is stored under its name in between counts."""
    id = kit.put(store, 100)
    with PoolStore(store.path) as other:
        assert other.check(id) == []
        store.remove(id)
        with pytest.raises(ContextError, match="no context"):
            other.read_kv(id, 0)
        assert kit.put(store, 100) == id
        assert other.check(id) == []
        with other.mapped(id) as mapped:
            mapped.verify(0, mapped.pages)
    assert os.listdir(store.path / "leases") != []
    np.testing.assert_array_equal(store.read_kv(id, 0)[0], kit.make(100)[1][0][0])


@pytest.mark.parametrize("stored_again", [True, False])
@pytest.mark.parametrize("use", ["tokens", "read_kv", "mapped", "check"])
def test_a_removal_between_two_looks_is_no_damage(store, kit, monkeypatch, use, stored_again):
    """The row was read, and then another process removed the context, and perhaps stored it."""
    id = kit.put(store, 100)
    with PoolStore(store.path, read_only=True) as other:
        real, done = other._pool.entry, []

        def entry(id):
            found = real(id)
            if not done:
                done.append(True)
                store.remove(id)
                store.gc()
                if stored_again:
                    kit.put(store, 100)
            return found

        monkeypatch.setattr(other._pool, "entry", entry)
        asked = {
            "tokens": lambda: other.tokens(id),
            "read_kv": lambda: other.read_kv(id, 1),
            "mapped": lambda: other.mapped(id).close(),
            "check": lambda: other.check(id),
        }[use]
        if stored_again:
            asked()
        else:
            with pytest.raises(ContextError, match="no context"):
                asked()
    assert not store._pool.catalogue.snapshot().damage
