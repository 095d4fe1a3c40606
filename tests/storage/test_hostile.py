"""Databases that somebody made to do harm, or that are something else: refused by name.

Kind: files written by hand, with checksums that are right where that helps the attacker.
"""

import contextlib
import json
import os
import sqlite3

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alaya_jax.errors import AlayaError, DatabaseError
from alaya_jax.storage import PoolStore, checksums
from alaya_jax.storage.rows import BadRow, Layout, PageList, checksum, entry, facts, row


@pytest.fixture
def path(tmp_path, kit):
    with PoolStore(tmp_path / "db") as store:
        kit.put(store, 40)
    return tmp_path / "db"


def change(path, **fields):
    """Rewrites the only context's row, with a checksum that is right."""
    with contextlib.closing(sqlite3.connect(path / "catalogue.sqlite")) as catalogue:
        ((key, said),) = catalogue.execute("SELECT key, facts FROM contexts").fetchall()
        data = json.loads(said)
        for name, value in fields.items():
            if name.startswith("header_"):
                data["header"][name.removeprefix("header_")] = value
            else:
                data[name] = value
        new = json.dumps(data, sort_keys=True).encode()
        row = new, checksum("contexts", key, new), key
        catalogue.execute("UPDATE contexts SET facts = ?, checksum = ? WHERE key = ?", row)
        catalogue.commit()


def all_is_refused(path):
    with PoolStore(path) as store:
        (record,) = store.list()
        refused = 0
        for use in (
            lambda: store.tokens(record.id),
            lambda: store.read_kv(record.id, 0),
            lambda: store.mapped(record.id).close(),
            lambda: store.read_kv(record.id, 2, 0, 1),
        ):
            try:
                use()
            except AlayaError:
                refused += 1
        assert refused
        assert store.check(record.id) != []
        store.remove(record.id)
        assert store.list() == []
        store.gc()


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "../../../../tmp/x"},
        {"id": "/etc/passwd"},
        {"id": ""},
        {"id": 5},
        {"num_tokens": 2**31},
        {"num_tokens": 10**30},
        {"num_tokens": -1},
        {"num_tokens": 41.5},
        {"num_tokens": 48},
        {"num_tokens": True},
        {"segment": "../x"},
        {"segment": -1},
        {"segment": 12345},
        {"removed": 0, "pinned": "yes"},
        {"header_num_layers": 10**9},
        {"header_head_dim": 16},
        {"header_page_size": 4},
        {"header_dtype": "float64"},
        {"header_dtype": "object"},
        {"header_namespace": ["x"]},
        {"header_surprise": 1},
        {"surprise": 1},
        {"created": "now"},
        {"header": None},
    ],
    ids=str,
)
def test_a_row_that_lies_is_refused(path, fields):
    change(path, **fields)
    all_is_refused(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["db"]


def write_pages(path, slots):
    with contextlib.closing(sqlite3.connect(path / "catalogue.sqlite")) as catalogue:
        data = PageList(np.array(slots), np.zeros(len(slots))).to_bytes()
        catalogue.execute("UPDATE lists SET pages = ?", (data,))
        catalogue.commit()
    change(path, pages=checksums.of_bytes(data) >> 1)


@pytest.mark.parametrize(
    "slots", [[0, 1, 65536], [0, 1, -1], [0, 1, 1], [0, 1], [0, 1, 2, 3], [], [2**31 - 1, 1, 2]]
)
def test_pages_that_are_not_there_are_refused(path, slots):
    write_pages(path, slots)
    with PoolStore(path) as store:
        (record,) = store.list()
        for use in (lambda: store.read_kv(record.id, 0), lambda: store.mapped(record.id)):
            with pytest.raises(AlayaError, match="pages as they are listed"):
                use()


def test_pages_of_another_write_are_refused(path):
    write_pages(path, [0, 1, 2])
    with PoolStore(path) as store:
        (record,) = store.list()
        with pytest.raises(AlayaError, match="do not match their checksum"):
            store.read_kv(record.id, 0)


SCHEMAS = [
    "CREATE TABLE notes (text)",
    "CREATE VIEW more AS SELECT 1",
    "CREATE TRIGGER t AFTER INSERT ON contexts BEGIN DELETE FROM contexts; END",
    "CREATE INDEX i ON contexts (checksum)",
    "DROP TABLE damage",
    "ALTER TABLE contexts ADD COLUMN x",
    "PRAGMA user_version = 3",
    "PRAGMA application_id = 0",
]


@pytest.mark.parametrize("statement", SCHEMAS)
def test_another_schema_is_refused(path, statement):
    with contextlib.closing(sqlite3.connect(path / "catalogue.sqlite")) as catalogue:
        catalogue.execute(statement)
        catalogue.commit()
    with pytest.raises(DatabaseError, match="is not the catalogue of an alaya_jax database"):
        PoolStore(path)


@pytest.mark.parametrize("data", [b"", b"SQLite format 3\0", b"x" * 5000, b"\0" * 4096])
def test_what_is_no_catalogue_is_refused(path, data):
    (path / "catalogue.sqlite").write_bytes(data)
    for name in ("-wal", "-shm"):
        (path / f"catalogue.sqlite{name}").unlink(missing_ok=True)
    with pytest.raises(DatabaseError, match=r"catalogue\.sqlite cannot be used"):
        PoolStore(path)


def test_a_missing_catalogue_is_not_made_anew(path):
    (path / "catalogue.sqlite").unlink()
    with pytest.raises(DatabaseError, match="it is no file"):
        PoolStore(path)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"format": "other"}', "[" * 10_000, "\ud800", "9" * 5000]
)
def test_foreign_marks_are_refused(path, text):
    (path / "alaya_db.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(DatabaseError, match=r"alaya_db\.json says"):
        PoolStore(path)


@pytest.mark.parametrize("name", ["k.000", "v.002", "checksums"])
def test_links_out_of_the_database_are_not_followed(path, name, tmp_path):
    (file,) = path.glob(f"segments/*/{name}")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    with PoolStore(path) as store:
        (record,) = store.list()
        assert f"{name} cannot be opened" in record.problem
        with pytest.raises(AlayaError, match=f"{name} cannot be opened"):
            store.mapped(record.id)
        store.remove(record.id)
        store.gc()
    assert (tmp_path / "elsewhere").read_bytes() == before


def test_collecting_takes_links_away_and_not_what_they_lead_to(path, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("mine")
    for folder in ("segments", "indexes", "leases"):
        (path / folder / "99").symlink_to(tmp_path / "mine")
    with PoolStore(path) as store:
        store.gc()
        assert store.check(store.list()[0].id) == []
    assert (tmp_path / "mine" / "thesis").read_text() == "mine"
    assert not [p for p in path.rglob("*") if p.is_symlink()]


@pytest.mark.parametrize("name", ["catalogue.sqlite", "lock"])
def test_a_link_in_place_of_a_file_is_refused(path, name, tmp_path):
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    with pytest.raises(DatabaseError, match=f"{name} cannot be used|cannot open a database"):
        PoolStore(path)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["id", "header", "num_tokens", "segment", "x"]), PLAIN))
def test_any_facts_are_a_row_or_a_bad_row(data):
    said = json.dumps(data).encode()
    with pytest.raises(BadRow):
        entry(1, said)
    with pytest.raises(BadRow):
        row(Layout, said)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_row_or_a_bad_row(said):
    with pytest.raises(BadRow):
        entry(1, said)


@given(st.integers(-(2**40), 2**40), st.integers(0, 2**40))
def test_a_layout_has_a_size(count, other):
    fields = {"num_layers": 1, "num_kv_heads": other, "page_size": 1, "head_dim": 1}
    said = json.dumps({"dtype": "float32", "num_pages": count, **fields}).encode()
    try:
        layout = row(Layout, said)
    except BadRow:
        return
    assert layout.file_bytes == count * other * 4 > 0
    assert row(Layout, facts(layout)) == layout


@given(st.binary(max_size=100), st.integers(0, 5), st.integers(1, 70))
def test_any_bytes_are_a_list_of_pages_or_not(data, count, slots):
    try:
        pages = PageList.from_bytes(data, count, slots)
    except BadRow:
        return
    assert len(pages) == count
    assert pages.to_bytes() == data
    assert set(pages.slots.tolist()) <= set(range(slots))


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.binary(max_size=200), at=st.integers(0, 20_000))
def test_bytes_of_a_stranger_in_the_catalogue(tmp_path_factory, kit, data, at):
    """Whatever is written over a part of it: an error of ours, or all is right."""
    path = tmp_path_factory.mktemp("stranger") / "db"
    with PoolStore(path) as store:
        tokens, kv = kit.make(40)
        id = store.write(kit.HEADER, tokens, kit.source(kv)).id
    with (path / "catalogue.sqlite").open("r+b") as file:
        file.seek(at)
        file.write(data)
    try:
        with PoolStore(path) as store:
            for record in store.list():
                if record.problem is None:
                    assert record.id == id
                    np.testing.assert_array_equal(store.tokens(id), tokens)
                    np.testing.assert_array_equal(store.read_kv(id, 1)[0], kv[1][0])
            store.check_catalogue()
    except AlayaError as error:
        assert os.fspath(path) in str(error)  # noqa: PT017 - which error is what is asked
