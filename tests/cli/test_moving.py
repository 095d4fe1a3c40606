"""Contexts between databases by command: pushed, pulled, in step, and as a file."""

import json

import numpy as np
import pytest

from alaya_jax.storage import ContextHeader, PoolStore
from alaya_jax.storage.object_store import SharedStore

HEADER = ContextHeader(
    fingerprint="model", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=4, page_size=16
)


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/shared/"


@pytest.fixture
def db(tmp_path):
    """Stores contexts of some lengths, which begin alike, in a database; their ids."""

    def db(*lengths, name="here", first=0):
        ids = []
        with PoolStore(tmp_path / name) as store:
            for n in lengths:
                tokens = np.arange(n, dtype=np.int32) + first
                kv = np.arange(2 * 2 * 2 * n * 4, dtype=np.float32).reshape(2, 2, 2, n, 4)
                ids.append(store.write(HEADER, tokens, iter(kv)).id)
        return ids

    return db


@pytest.fixture
def moving(alaya, tmp_path):
    """Runs a verb of `alaya db` on a database, and gives what it reports."""

    def run(*arguments, name="here", code=0):
        done = alaya("db", *arguments, "--db", tmp_path / name, "--json", code=code)
        return json.loads(done.stdout) if done.stdout else done.stderr

    return run


def ids_of(rows):
    return [row["id"] for row in rows]


@pytest.mark.smoke
def test_push_and_pull(moving, db, url, tmp_path, alaya):
    ids = db(300, 600)
    pushed = moving("push", url)
    assert ids_of(pushed["pushed"]) == ids
    assert [row["chunks_moved"] for row in pushed["pushed"]] == [2, 2]  # one is shared
    assert (pushed["remote"], pushed["failed"], pushed["dry_run"]) == (url, [], False)
    again = moving("push", url)
    assert [row["bytes_moved"] for row in again["pushed"]] == [0, 0]

    there = moving("pull", url, "--dry-run", name="there")
    assert set(ids_of(there["pulled"])) == set(ids)
    assert there["database"] == str(tmp_path / "there")
    assert not (tmp_path / "there").exists()
    assert "chunks_moved" not in there["pulled"][0]
    assert ids_of(moving("pull", url, ids[1][:6], name="there")["pulled"]) == ids[1:]
    assert ids_of(moving("pull", url, "--dry-run", name="there")["pulled"]) == ids[:1]
    moving("pull", url, name="there")
    assert set(ids_of(moving("ls", name="there")["contexts"])) == set(ids)
    moving("check", name="there")
    said = alaya("db", "pull", url, "--db", tmp_path / "there")
    assert said.stdout == ""
    assert f"Was there: {ids[0]}: 300 tokens" in said.stderr


def test_sync_goes_both_ways(moving, db, url):
    mine, theirs = db(300), db(400, name="there", first=5)
    moving("push", url, name="there")
    planned = moving("sync", url, "--dry-run")
    assert (ids_of(planned["pulled"]), ids_of(planned["pushed"])) == (theirs, mine)
    done = moving("sync", url)
    assert [row["chunks_moved"] for row in done["pulled"] + done["pushed"]] == [2, 2]
    done = moving("sync", url)
    assert all(row["chunks_moved"] == 0 for row in done["pulled"] + done["pushed"])
    assert ids_of(moving("sync", url, name="there")["pulled"]) != []
    for name in ("here", "there"):
        assert set(ids_of(moving("ls", name=name)["contexts"])) == {*mine, *theirs}


def test_what_is_damaged_does_not_keep_the_others(moving, db, url):
    ids = db(300) + db(400, first=7)
    moving("push", url)
    place = SharedStore(url)
    heading = b'"first":256'
    keys = [k for k in place.keys("chunks/") if heading in place.read(k).data]
    (key,) = [k for k in keys if len(place.read(k).data) < 10_000]  # of 300 tokens
    found = place.read(key)
    place.replace(key, found.data[:-1], found.version)
    pulled = moving("pull", url, name="there", code=1)
    assert ids_of(pulled["pulled"]) == [ids[1]]
    assert ids_of(pulled["failed"]) == [ids[0]]
    assert key in pulled["failed"][0]["problem"]
    assert "--repair" in pulled["failed"][0]["problem"]
    assert [row["chunks_moved"] for row in moving("push", url, "--repair")["pushed"]] == [1, 0]
    assert ids_of(moving("pull", url, ids[0], name="there")["pulled"]) == [ids[0]]


def test_what_is_damaged_here_is_taken_anew(moving, db, url, tmp_path):
    db(300)
    moving("push", url)
    moving("pull", url, name="there")
    file = next((tmp_path / "there" / "segments").glob("*/k.001"))
    with file.open("r+b") as data:
        data.seek(data.seek(0, 3))  # SEEK_DATA: the file has holes
        data.write(b"damaged!")
    moving("check", name="there", code=1)
    assert moving("pull", url, "--repair", name="there")["pulled"][0]["chunks_moved"] > 0
    moving("check", name="there")
    assert moving("pull", url, "--repair", name="there")["pulled"][0]["chunks_moved"] == 0


def test_a_damaged_record_is_told(moving, db, url):
    db(30)
    moving("push", url)
    place = SharedStore(url)
    (key,) = place.keys("contexts/")
    found = place.read(key)
    place.replace(key, found.data[:-1], found.version)
    pulled = moving("pull", url, name="there", code=1)
    assert pulled["pulled"] == []
    assert key in pulled["failed"][0]["problem"]
    moving("push", url)  # mends it, since it was looked at
    moving("pull", url, name="there")


def test_what_goes_wrong_is_said(moving, db, url, alaya, tmp_path):
    db(30)
    assert "begins with file://" in moving("push", "http://x/", code=1)
    assert "no context has this id" in moving("push", url, "zz", code=1)
    assert "there is no database" in moving("push", url, name="nothing", code=1)
    assert "no context has this id" in moving("pull", url, "zz", name="new", code=1)
    said = alaya("db", "pull", url, "--db", tmp_path / "new")
    assert "There is nothing to pull." in said.stderr
    assert "give the URL of a directory" in moving("push", "file:///proc/x/", code=1)


def test_export_and_import(moving, db, tmp_path):
    (id,) = db(300)
    file = tmp_path / "one.alaya"
    exported = moving("export", id[:8], file)
    assert (exported["context"], exported["bytes"]) == (id, file.stat().st_size)
    imported = moving("import", file, name="there")
    assert ids_of(imported["pulled"]) == [id]
    moving("check", name="there")
    with PoolStore(tmp_path / "here") as here, PoolStore(tmp_path / "there") as there:
        for found, want in zip(there.read_kv(id, 1), here.read_kv(id, 1), strict=True):
            np.testing.assert_array_equal(found, want)
    assert moving("import", file, name="there")["pulled"][0]["chunks_moved"] == 0

    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is damaged" in moving("import", file, name="new", code=1)
    assert not (tmp_path / "new").exists()
    assert "cannot be read" in moving("import", tmp_path / "nothing", code=1)
    assert "no context has this id" in moving("export", "zz", file, code=1)
