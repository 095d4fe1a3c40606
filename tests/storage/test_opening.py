"""How a directory becomes a database, and what is refused to be one."""

import json
import os

import numpy as np
import pytest

from alaya_jax.errors import DatabaseError
from alaya_jax.storage import PoolStore
from alaya_jax.storage.opening import MARK, MARK_TEXT, make_parts, require_mark


def test_paths_that_are_no_database(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DatabaseError, match="/file is a file; give the path of a directory"):
        PoolStore(file)
    with pytest.raises(
        DatabaseError, match=r"cannot open a database at .*/file/db: Not a directory"
    ):
        PoolStore(file / "db")
    with pytest.raises(DatabaseError, match="holds other files and is no database"):
        PoolStore(tmp_path)
    mine = tmp_path / "mine"
    (mine / "contexts" / "chapter 1").mkdir(parents=True)
    with pytest.raises(DatabaseError, match="holds other files and is no database"):
        PoolStore(mine)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["chapter 1", "contexts", "file", "mine"]
    (tmp_path / "empty").mkdir()
    PoolStore(tmp_path / "empty").close()
    PoolStore(tmp_path / "made" / "with" / "parents").close()


def test_files_are_for_their_owner_alone(kit, tmp_path):
    """Whatever the umask: directories 0700, files 0600."""
    before = os.umask(0)
    try:
        with PoolStore(tmp_path / "new" / "db") as store:
            id = kit.put(store)
            store.write_index(id, "graph", {}, [{"near": np.arange(3)}] * 3)
            modes = {p: p.lstat().st_mode & 0o777 for p in (store.path, *store.path.rglob("*"))}
            for path, mode in modes.items():
                assert mode == (0o700 if path.is_dir() else 0o600), path
            names = {p.name for p in modes}
    finally:
        os.umask(before)
    assert {"lock", "catalogue.sqlite", "alaya_db.json", "k.000", "checksums"} <= names


def test_other_marks_are_refused_by_what_they_say(tmp_path):
    path = tmp_path / "db"
    PoolStore(path).close()
    mark = path / "alaya_db.json"
    text = mark.read_text()
    mark.write_text(text.replace("3", "4"))
    with pytest.raises(DatabaseError, match=r"alaya_db.json says .*'version': 4.* use the release"):
        PoolStore(path)
    mark.write_text("[1")
    with pytest.raises(DatabaseError, match=r"alaya_db.json says None"):
        PoolStore(path)
    old = {"format": "alaya_jax database", "store": "directory", "version": 1}
    mark.write_text(json.dumps(old))
    with pytest.raises(
        DatabaseError, match=f"earlier version; bring it over with: alaya db migrate {path}"
    ):
        PoolStore(path)
    mark.unlink()
    PoolStore(path).close()
    assert mark.read_text() == text, "a directory that was not finished is"


def test_what_is_made_twice_is_made_once(tmp_path, kit, whole):
    path = tmp_path / "db"
    with PoolStore(path) as store:
        id = kit.put(store)
        make_parts(path)
        require_mark(path, MARK_TEXT)
        whole(store, id, *kit.make(20))
        assert json.loads((path / MARK).read_text()) == MARK_TEXT


@pytest.mark.parametrize("folder", ["segments", "indexes", "leases"])
def test_a_folder_that_is_a_link_is_refused(tmp_path, folder):
    path = tmp_path / "db"
    PoolStore(path).close()
    (path / folder).replace(tmp_path / "elsewhere")
    (path / folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DatabaseError, match=f"{folder} is no directory of the database's own"):
        PoolStore(path)
