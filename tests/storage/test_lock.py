"""Turns of writers and leases of readers, within a process and across."""

import os
import signal
import threading
import time

import pytest

from alaya_jax.storage import lock
from alaya_jax.storage.lock import Lease, holding, unused, writers_turn


def test_writers_take_turns(tmp_path):
    inside, most = 0, 0

    def write():
        nonlocal inside, most
        with writers_turn(tmp_path / "lock") as got:
            assert got
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    threads = [threading.Thread(target=write) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == (0, 1)


def test_who_waits_says_for_whom_and_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(lock, "SAID_AFTER", 0.1)
    begun = threading.Event()

    def write():
        with writers_turn(tmp_path / "lock"):
            begun.set()
            time.sleep(0.5)

    thread = threading.Thread(target=write)
    thread.start()
    begun.wait(10)
    with writers_turn(tmp_path / "lock", wait=False) as got:
        assert not got
    with writers_turn(tmp_path / "lock"):
        pass
    thread.join()
    (said,) = caplog.messages
    assert said.startswith(f"waiting for process {os.getpid()} since 20")
    assert said.endswith(f"which writes to {tmp_path}")
    assert (tmp_path / "lock").read_text() == ""


def test_a_turn_ends_with_an_error(tmp_path):
    with pytest.raises(KeyError), writers_turn(tmp_path / "lock"):
        raise KeyError
    with writers_turn(tmp_path / "lock", wait=False) as got:
        assert got


def test_a_turn_ends_with_the_life_of_its_process(tmp_path, kit):
    code = """
        from alaya_jax.storage.lock import writers_turn
        with writers_turn(path):
            print("mine", flush=True)
            time.sleep(60)
    """
    with kit.run_python(code, tmp_path / "lock") as process:
        assert process.stdout.readline() == "mine\n"
        with writers_turn(tmp_path / "lock", wait=False) as got:
            assert not got
        process.send_signal(signal.SIGKILL)
        process.wait()
    with writers_turn(tmp_path / "lock", wait=False) as got:
        assert got


def test_a_child_made_by_fork_does_not_hold_its_parents_turn(tmp_path, kit):
    """It would keep it for as long as it lives, and never give it back."""
    code = """
        from alaya_jax.storage.lock import writers_turn
        with writers_turn(path):
            if os.fork() == 0:
                os.close(0)
                os.close(1)
                time.sleep(60)
                os._exit(0)
        begun = time.monotonic()
        with writers_turn(path):
            print(time.monotonic() - begun < 30, flush=True)
        os.killpg(0, signal.SIGKILL)
    """
    with kit.run_python(code, tmp_path / "lock", start_new_session=True) as process:
        assert process.stdout.read() == "True\n"


def test_a_lease_is_shared_and_keeps_its_file_in_use(tmp_path):
    file = tmp_path / "lease"
    file.touch()
    with unused(file) as free:
        assert free
    one, other = Lease(file), Lease(file)
    for lease in (one, other):
        with unused(file) as free:
            assert not free
        lease.release()
        lease.release()
    with unused(file) as free:
        assert free
    with unused(tmp_path / "none") as free:
        assert free
    with pytest.raises(FileNotFoundError):
        Lease(tmp_path / "none")


def test_a_directory_that_is_held_is_not_taken_for_one_left_behind(tmp_path):
    with holding(tmp_path), unused(tmp_path) as free:
        assert not free
    with unused(tmp_path) as free:
        assert free


def test_links_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").touch()
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"), writers_turn(tmp_path / "lock"):
        pass
    with pytest.raises(OSError, match="symbolic"):
        Lease(tmp_path / "lock")
