"""Databases of an earlier version are brought over whole, whenever the process is killed."""

import dataclasses
import json
import signal
import zlib

import numpy as np
import pytest

from alaya_jax.errors import DatabaseError, DatabaseInUseError
from alaya_jax.storage import PoolStore
from alaya_jax.storage.checked import write_array, write_meta
from alaya_jax.storage.index_files import write_index
from alaya_jax.storage.lock import writers_turn
from alaya_jax.storage.migrate import migrate, old_contexts
from alaya_jax.storage.old_directory import BLOCK, OldContext

GRAPH = [{"near": np.arange(5 + layer)} for layer in range(3)]


def write_old(path, name, header, tokens, kv, created):
    """A context as the earlier version wrote it."""
    directory = path / "contexts" / name
    directory.mkdir(parents=True)
    checksums = []
    for layer, pair in enumerate(kv):
        rows = [np.ascontiguousarray(half.transpose(1, 0, 2)).view(np.uint8) for half in pair]
        (directory / f"layer_{layer:03d}.kv").write_bytes(b"".join(r.tobytes() for r in rows))
        blocks = range(0, len(tokens), BLOCK)
        checksums.append([[zlib.crc32(r[at : at + BLOCK]) for at in blocks] for r in rows])
    files = {
        "tokens.npy": write_array(directory / "tokens.npy", tokens.astype("<i4")),
        "checksums.npy": write_array(directory / "checksums.npy", np.array(checksums, "<u4")),
    }
    meta = {
        "version": 2,
        "id": name,
        "header": dataclasses.asdict(header),
        "num_tokens": len(tokens),
        "created": created,
        "files": files,
    }
    write_meta(directory, meta)
    return directory


@pytest.fixture
def old(tmp_path, kit):
    """An old database of three contexts, one of them with a graph; (tokens, kv) by old id."""
    path, made = tmp_path / "db", {}
    for i, count in enumerate((300, 5, 256)):
        header = dataclasses.replace(
            kit.HEADER, title=f"the {i}th", origin=((3, "TopK"),) * (i == 1)
        )
        made[f"old{i}"] = (header, *kit.make(count, seed=i))
        write_old(path, f"old{i}", *made[f"old{i}"], created=1000.5 - i)
    index = path / "contexts" / "old2" / "index_graph"
    index.mkdir()
    write_index(index, "graph", {"degree": 3}, GRAPH)
    (path / "lock").touch()
    mark = {"format": "alaya_jax database", "store": "directory", "version": 1}
    (path / "alaya_db.json").write_text(json.dumps(mark))
    return path, made


def test_the_reader_of_the_old_form(old, kit):
    path, made = old
    assert [c.record.id for c in old_contexts(path)] == ["old2", "old1", "old0"]
    _, tokens, kv = made["old0"]
    context = OldContext(path / "contexts" / "old0")
    np.testing.assert_array_equal(context.tokens(), tokens)
    for start, end in ((0, None), (0, 7), (254, 258), (4, 4)):
        k, v = context.read_kv(1, start, end)
        np.testing.assert_array_equal(k, kv[1][0][:, start:end])
        np.testing.assert_array_equal(v, kv[1][1][:, start:end])
    kit.flip(path / "contexts" / "old0" / "layer_001.kv", -1)
    context.read_kv(1, 0, 256)
    with pytest.raises(Exception, match="values of tokens 256 to 299 of layer 1"):
        context.read_kv(1, 256, None)


def is_over(path, made, whole):
    with PoolStore(path) as store:
        by_title = {r.header.title: r for r in store.list()}
        assert len(by_title) == len(store.list()) == len(made)
        for i, (name, (header, tokens, kv)) in enumerate(made.items()):
            record = by_title[header.title]
            assert (record.header, record.created) == (header, 1000.5 - i), name
            whole(store, record.id, tokens, kv)
        graph = store.read_index(by_title["the 2th"].id, "graph", 2)
        np.testing.assert_array_equal(graph["near"], GRAPH[2]["near"])
        assert store.gc().bytes_after < 1 << 20
    assert not (path / "contexts").exists()


def test_everything_comes_over(old, whole):
    path, made = old
    with pytest.raises(DatabaseError, match=f"alaya db migrate {path}"):
        PoolStore(path)
    seen = []
    done = migrate(path, seen.append)
    assert sum(seen) == sum(x.nbytes for _, _, kv in made.values() for pair in kv for x in pair)
    assert (set(done.contexts), done.indexes, done.damaged) == (set(made), 1, {})
    is_over(path, made, whole)
    assert migrate(path).contexts == {}, "once more does nothing"


def test_what_is_damaged_stays_where_it_is_and_is_named(old, whole, kit):
    path, made = old
    kit.flip(path / "contexts" / "old0" / "layer_002.kv", 10)
    kit.flip(path / "contexts" / "old2" / "index_graph" / "layer_001_near.npy", -1)
    done = migrate(path)
    assert set(done.contexts) == {"old1", "old2"}
    assert "keys of tokens 0 to 255 of layer 2" in done.damaged["old0"]
    assert "layer_001_near.npy" in done.lost[done.contexts["old2"]]
    assert [p.name for p in (path / "contexts").iterdir()] == ["old0"]
    with PoolStore(path) as store:
        assert len(store.list()) == 2
        whole(store, done.contexts["old1"], *made["old1"][1:])
    # Once it is right again, it comes over too.
    kit.flip(path / "contexts" / "old0" / "layer_002.kv", 10)
    assert set(migrate(path).contexts) == {"old0"}
    assert not (path / "contexts").exists()


def test_a_database_in_use_is_left_alone(old):
    path, _ = old
    with (
        writers_turn(path / "lock"),
        pytest.raises(DatabaseInUseError, match="in use by another process"),
    ):
        migrate(path)
    assert {p.name for p in path.iterdir()} == {"alaya_db.json", "contexts", "lock"}


def test_what_is_no_database_is_refused(tmp_path):
    with pytest.raises(DatabaseError, match="there is no database"):
        migrate(tmp_path)
    (tmp_path / "alaya_db.json").write_text("{}")
    with pytest.raises(DatabaseError, match="use the release"):
        migrate(tmp_path)


KILLED = """
    from alaya_jax.storage import migrate as module
    calls = int(sys.argv[2])
    def audit(event, arguments):
        global calls
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "sqlite3.connect"):
            if str(path) in str(arguments) or event.startswith("os."):
                calls -= 1
                if calls == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)
    module.migrate(path)
    print("done")
"""


@pytest.mark.parametrize("calls", [1, 8, 20, 45, 70, 95, 110])
def test_killed_anywhere_it_goes_on(old, whole, kit, calls):
    """Killed at a call that opens, makes, renames or removes a file; then given again."""
    path, made = old
    with kit.run_python(KILLED, path, calls) as process:
        said = process.stdout.read()
    assert (process.returncode, said) in ((-signal.SIGKILL, ""), (0, "done\n"))
    migrate(path)
    is_over(path, made, whole)
