"""One writer or many readers; test_directory_store has the same across processes."""

import gc
import os

import pytest

from alaya_jax.errors import DatabaseInUseError
from alaya_jax.storage.lock import DatabaseLock


def test_a_writer_keeps_others_out_and_leaves_its_name(tmp_path):
    lock = DatabaseLock(tmp_path, shared=False)
    assert f"process {os.getpid()} since " in (tmp_path / "lock").read_text()
    for shared in (False, True):
        with pytest.raises(DatabaseInUseError, match="already open for writing in this process"):
            DatabaseLock(tmp_path, shared=shared)
    lock.release()
    assert (tmp_path / "lock").read_text() == ""
    DatabaseLock(tmp_path, shared=False).release()


def test_readers_share_and_keep_a_writer_out(tmp_path):
    first, second = (DatabaseLock(tmp_path, shared=True) for _ in range(2))
    with pytest.raises(DatabaseInUseError, match="read_only=True in another process"):
        DatabaseLock(tmp_path, shared=False)
    first.release()
    with pytest.raises(DatabaseInUseError):
        DatabaseLock(tmp_path, shared=False)
    second.release()
    DatabaseLock(tmp_path, shared=False).release()


def test_a_lock_goes_with_its_object_and_release_may_be_called_twice(tmp_path):
    lock = DatabaseLock(tmp_path, shared=False)
    del lock
    gc.collect()
    lock = DatabaseLock(tmp_path, shared=False)
    lock.release()
    lock.release()


def test_the_note_of_a_writer_that_died_is_cleared_by_the_next_reader(tmp_path):
    (tmp_path / "lock").write_text("process 999999 since 2026-01-01T00:00:00+00:00\n")
    reader = DatabaseLock(tmp_path, shared=True)
    with pytest.raises(DatabaseInUseError, match="read_only=True"):
        DatabaseLock(tmp_path, shared=False)
    reader.release()


def test_a_reader_needs_no_right_to_write(tmp_path):
    if os.getuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "lock").touch()
    (tmp_path / "lock").chmod(0o444)
    DatabaseLock(tmp_path, shared=True).release()
    with pytest.raises(OSError, match="lock"):
        DatabaseLock(tmp_path, shared=False)
