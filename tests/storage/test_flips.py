"""Rows 21 and 25: whatever bit of a database turns, an answer is right or refused by name, and
what was refused leaves nothing behind. Kind: random damage to every file.
"""

import contextlib
import dataclasses
import os
import random
import shutil
import sqlite3

import numpy as np
import pytest

from alaya_jax.errors import AlayaError, ContextError, DatabaseError
from alaya_jax.storage import PoolStore


@pytest.fixture(scope="module", params=["closed", "log"])
def pristine(request, tmp_path_factory, kit):
    """A database of three contexts, two of which share pages, one with a graph: closed, or with a
    log that is not yet in the catalogue, and then in 8 bits. (path, what each holds by id)
    """
    path, held = tmp_path_factory.mktemp("flips") / "db", {}
    store = PoolStore(path)
    header = small_pages(kit, coded=request.param == "log")
    tokens, kv = kit.make(60, header)
    held[store.write(header, tokens, kit.source(kv)).id] = tokens, kv
    longer, longer_kv = kit.make(90, header, seed=1)
    longer[:50] = tokens[:50]
    both = [
        tuple(np.concatenate([a[:, :48], b[:, 48:]], 1) for a, b in zip(x, y, strict=True))
        for x, y in zip(kv, longer_kv, strict=True)
    ]
    held[store.write(header, longer, kit.source(longer_kv)).id] = longer, both
    other, other_kv = kit.make(30, header, seed=2)
    id = store.write(header, other, kit.source(other_kv)).id
    held[id] = other, other_kv
    store.write_index(id, "graph", {"degree": 3}, [{"near": np.arange(40)}] * 3)
    if request.param == "closed":
        store.close()
    copy = path.with_name("copy")
    copied(path, copy)  # with its log, as if the power had gone
    store.close()
    assert (copy / "catalogue.sqlite-wal").exists() == (request.param == "log")
    return copy, held


def small_pages(kit, *, coded):
    """The header of all contexts."""
    header = dataclasses.replace(kit.HEADER, page_size=8)
    return kit.stored_in("int8", header) if coded else header


def copied(path, to):
    """A copy of a database with its holes."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(0o700)
    for file in sorted(path.rglob("*")):
        there = to / file.relative_to(path)
        if file.is_dir():
            there.mkdir()
            continue
        with file.open("rb") as source, there.open("wb") as target:
            target.truncate(file.stat().st_size)
            for start, data in pieces(source, file.stat().st_size):
                target.seek(start)
                target.write(data)


def pieces(file, size):
    """(offset, bytes) of what is allocated of a file."""
    at = 0
    while at < size:
        try:
            start = os.lseek(file.fileno(), at, os.SEEK_DATA)
        except OSError:
            return
        at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        yield start, os.pread(file.fileno(), at - start, start)


def places(path):
    """Every file, and the offsets of its bytes that are no holes."""
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as opened:
            found = list(pieces(opened, file.stat().st_size))
        if found:
            yield file, found


def answers(path, held):
    """Asks for everything; (right ones, refused ones, what is not there). A wrong one fails,
    and so does another error than ours.
    """
    right, refused, absent = set(), [], set()
    try:
        store = PoolStore(path)
    except AlayaError as error:
        return right, [str(error)], absent
    with store:
        try:
            records = {record.id: record for record in store.list()}
        except AlayaError as error:
            return right, [str(error)], absent
        for id, (tokens, kv) in held.items():
            if id not in records:
                absent.add(id)
                refused += [r.problem for r in records.values() if r.header is None]
                continue
            try:
                np.testing.assert_array_equal(store.tokens(id), tokens)
                with store.mapped(id) as mapped:
                    for layer, pair in enumerate(kv):
                        for got, want in zip(store.read_kv(id, layer), pair, strict=True):
                            np.testing.assert_array_equal(got, want)
                        mapped.verify(layer, mapped.pages)
                        for half, want in zip(mapped.layer(layer), pair, strict=True):
                            got = half[:, mapped.pages].reshape(len(half), -1, half.shape[-1])
                            np.testing.assert_array_equal(got[:, : len(tokens)], want)
                for kind in store.indexes(id):
                    for layer in range(3):
                        near = store.read_index(id, kind, layer)["near"]
                        np.testing.assert_array_equal(near, np.arange(40))
                right.add(id)
            except AlayaError as error:
                refused.append(str(error))
    return right, refused, absent


@pytest.mark.parametrize(
    "rounds", [40, pytest.param(200, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_random_flips_in_every_file(pristine, tmp_path, kit, rounds):
    path, held = pristine
    header = small_pages(kit, coded=(path / "catalogue.sqlite-wal").exists())
    rng, kinds = random.Random(1), {}
    for _ in range(rounds):
        copied(path, tmp_path / "db")
        files = list(places(tmp_path / "db"))
        file, found = rng.choice(files)
        if rng.random() < 0.3:  # the catalogue has most ways to go wrong
            file, found = next(x for x in files if x[0].name == "catalogue.sqlite")
        start, data = rng.choice(found)
        used = np.flatnonzero(np.frombuffer(data, np.uint8))
        at = rng.choice(used.tolist()) if rng.random() < 0.8 and len(used) else 0
        kit.flip(file, start + (at or rng.randrange(len(data))), rng.randrange(8))
        _, refused, absent = answers(tmp_path / "db", held)
        if absent and not refused:
            # A log that is cut at the damage is an earlier state: what came last is not there.
            assert file.name == "catalogue.sqlite-wal", file
        kinds[file.name] = kinds.get(file.name, 0) + bool(refused)
        # Nothing is left behind that spoils what comes: stored again, all is right, or the database
        # is refused as a whole, by name.
        with contextlib.suppress(DatabaseError), PoolStore(tmp_path / "db") as store:
            for record in store.list():
                if record.header is None:
                    store.remove(record.id)
            for id, (tokens, kv) in held.items():
                assert store.write(header, tokens, kit.source(kv)).id == id
                for layer, pair in enumerate(kv):
                    for got, want in zip(store.read_kv(id, layer), pair, strict=True):
                        np.testing.assert_array_equal(got, want)
    if not (path / "catalogue.sqlite-wal").exists():
        assert kinds["catalogue.sqlite"] > 0
    assert sum(kinds.values()) > rounds // 8


def test_every_file_that_matters_is_noticed(pristine, tmp_path, kit):
    """One flip in the middle of what each file holds: never all right in silence."""
    path, held = pristine
    unnoticed = set()
    for name in {file.relative_to(path).as_posix() for file, _ in places(path)}:
        copied(path, tmp_path / "db")
        with (tmp_path / "db" / name).open("rb") as file:
            start, data = next(pieces(file, (tmp_path / "db" / name).stat().st_size))
        middle = max(1, len(data.rstrip(b"\0"))) // 2
        if name == "catalogue.sqlite":
            middle = data.find(b"head_dim") if b"head_dim" in data else middle
        kit.flip(tmp_path / "db" / name, start + middle)
        _, refused, absent = answers(tmp_path / "db", held)
        if not refused and not absent:
            unnoticed.add(name)
    # With a log, the catalogue is in the log, and the third is written anew when it is opened.
    logged = {"catalogue.sqlite", "catalogue.sqlite-wal", "catalogue.sqlite-shm"}
    assert unnoticed <= (logged if (path / "catalogue.sqlite-wal").exists() else set())


def test_row_6_a_page_that_is_cut_short_is_no_page(pristine, tmp_path):
    """Kind: truncation, at many lengths; and an earlier copy of one file beside newer others."""
    path, held = pristine
    rng = random.Random(2)
    for _ in range(20):
        copied(path, tmp_path / "db")
        file = rng.choice([*(tmp_path / "db").glob("segments/*/*")])
        with file.open("r+b") as opened:
            opened.truncate(rng.randrange(file.stat().st_size))
        right, refused, absent = answers(tmp_path / "db", held)
        assert not right
        assert not absent
        assert len(refused) == 3
        assert all(f"{file.name} has" in text for text in refused)


def test_an_older_copy_of_a_file_is_noticed(tmp_path, kit):
    """The pages that lay there before are right in themselves; so are their checksums."""
    with PoolStore(tmp_path / "db") as store:
        first = kit.put(store, 60)
    copied(tmp_path / "db", tmp_path / "before")
    with PoolStore(tmp_path / "db") as store:
        store.remove(first)
        id = kit.put(store, 60, seed=1)
    (segment,) = (tmp_path / "db" / "segments").iterdir()
    (older,) = (tmp_path / "before" / "segments").iterdir()
    assert segment.name == older.name
    shutil.rmtree(segment)
    older.rename(segment)
    with PoolStore(tmp_path / "db") as store:
        for layer in range(3):
            with pytest.raises(ContextError, match="keys of tokens 0 to 15"):
                store.read_kv(id, layer)


def test_rows_that_are_lost_are_missed(pristine, tmp_path):
    path, _ = pristine
    for table in ("contexts", "segments", "indexes"):
        copied(path, tmp_path / "db")
        with contextlib.closing(sqlite3.connect(tmp_path / "db" / "catalogue.sqlite")) as catalogue:
            catalogue.execute(f"DELETE FROM {table} WHERE key = (SELECT min(key) FROM {table})")
            catalogue.commit()
        with (
            pytest.raises(
                DatabaseError, match=r"catalogue\.sqlite cannot be used: rows are missing"
            ),
            PoolStore(tmp_path / "db") as store,
        ):
            store.list()
