"""`alaya db`: what looks after a database without a model."""

import contextlib
import json
import sqlite3

import numpy as np
import pytest

from alaya_jax.storage import ContextHeader, PoolStore

HEADER = ContextHeader(
    fingerprint="model",
    dtype="float32",
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    page_size=16,
    title="a title",
)
PAGE = 2 * 2 * 2 * 16 * 4 * 4


def kv(n):
    return np.arange(2 * 2 * 2 * n * 4, dtype=np.float32).reshape(2, 2, 2, n, 4)


@pytest.fixture
def path(tmp_path):
    """A database of two contexts, of which the shorter begins the longer."""
    with PoolStore(tmp_path / "db") as store:
        for n in (100, 64):
            store.write(HEADER, np.arange(n), kv(n))
    return tmp_path / "db"


@pytest.fixture
def run(alaya, path):
    """Runs a verb, and gives what it reports."""

    def run(*arguments, code=0):
        return json.loads(alaya("db", *arguments, "--db", path, "--json", code=code).stdout)

    return run


@pytest.fixture
def ids(run):
    return [row["id"] for row in run("ls")["contexts"]]


def test_show(run, alaya, path, ids):
    shown = run("show", ids[0][:8])["context"]
    assert shown.pop("leaves") == {}, "no plan asked an index"
    assert shown == run("ls")["contexts"][0]
    assert (shown["tokens"], shown["title"], shown["page_size"]) == (100, "a title", 16)
    assert shown["bytes"] == 2 * 2 * 2 * 100 * 4 * 4
    text = alaya("db", "show", ids[0], "--db", path).stdout
    assert "a title" in text
    assert "created:     20" in text
    assert "store_dtype: float32" in text
    assert "no context has this id" in alaya("db", "show", "x", "--db", path, code=1).stderr


def test_stats(run, alaya, path):
    found = run("stats")
    assert (found["contexts"], found["tokens"]) == (2, 164)
    assert found["bytes_held"] == 11 * PAGE
    assert found["bytes_shared"] == 4 * PAGE
    assert 7 * PAGE < found["bytes_on_disk"] < 7 * PAGE + (1 << 20)
    text = alaya("db", "stats", "--db", path).stdout
    assert "2, 164 tokens" in text
    assert "stored once for several" in text


def test_pin_and_unpin(run, alaya, path, ids):
    assert run("pin", ids[0])["pinned"] == [ids[0]]
    assert [row["pinned"] for row in run("ls")["contexts"]] == [True, False]
    assert "(pinned)" in alaya("db", "ls", "--db", path).stdout
    assert "is pinned; unpin it first" in alaya("db", "rm", ids[0], "--db", path, code=1).stderr
    assert run("unpin", ids[0], ids[1])["unpinned"] == ids
    assert run("rm", *ids)["removed"] == ids


def test_gc(run, alaya, path, ids):
    with PoolStore(path) as store, store.mapped(ids[0]):
        run("rm", ids[0])
        found = run("gc")
        assert (found["contexts"], found["in_use"]) == (0, 1)
        said = alaya("db", "gc", "--db", path).stderr
        assert "Of removed contexts 1 are still read" in said
    run("rm", ids[1])
    found = run("gc")
    assert (found["contexts"], found["in_use"]) == (0, 0)
    assert found["bytes_after"] < found["bytes_before"] or found["segments"] == 1
    assert "are in use" in alaya("db", "gc", "--db", path).stdout


def test_check_names_what_is_damaged_and_the_way_out(run, alaya, path, ids):
    assert run("check") == {
        "database": str(path),
        "contexts": {id: [] for id in ids},
        "damaged": [],
        "catalogue": [],
    }
    with contextlib.closing(sqlite3.connect(path / "catalogue.sqlite")) as catalogue:
        catalogue.execute("UPDATE contexts SET facts = replace(facts, 'a title', 'another')")
        catalogue.commit()
    found = run("check", code=1)
    assert len(found["damaged"]) == 2
    assert all(id.startswith("unreadable-") for id in found["damaged"])
    listed = alaya("db", "ls", "--db", path).stdout
    assert listed.count("its row in catalogue.sqlite is unreadable") == 2
    said = alaya("db", "check", "--db", path, code=1)
    assert f"alaya db rm {' '.join(found['damaged'])}" in said.stderr
    run("rm", *found["damaged"])
    assert run("check")["contexts"] == {}


def test_migrate(alaya, tmp_path, write_old):
    path = tmp_path / "old"
    for i, n in enumerate((300, 5)):
        numbers = [(k.copy(), v.copy()) for k, v in kv(n)]
        write_old(path, f"old{i}", HEADER, np.arange(n) + i, numbers, created=100.0 + i)
    refused = alaya("db", "ls", "--db", path, code=1).stderr
    assert f"alaya db migrate {path}" in refused
    done = json.loads(alaya("db", "migrate", path, "--json").stdout)
    assert set(done["contexts"]) == {"old0", "old1"}
    rows = json.loads(alaya("db", "ls", "--db", path, "--json").stdout)["contexts"]
    assert [row["id"] for row in rows] == list(done["contexts"].values())
    assert [row["created"] for row in rows] == [100.0, 101.0]
    assert "0 contexts and 0 graphs are over" in alaya("db", "migrate", "--db", path).stdout
    assert json.loads(alaya("db", "check", "--db", path, "--json").stdout)["damaged"] == []


def test_migrate_keeps_what_is_damaged(alaya, tmp_path, write_old):
    path = tmp_path / "old"
    write_old(path, "old0", HEADER, np.arange(30), list(kv(30)), created=1.0)
    (path / "contexts" / "old0" / "layer_001.kv").write_bytes(b"")
    said = alaya("db", "migrate", path, code=1)
    assert f"{path / 'contexts' / 'old0'} was kept" in said.stderr
    assert (path / "contexts" / "old0").is_dir()
