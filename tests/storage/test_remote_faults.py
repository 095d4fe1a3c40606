"""Pushes and pulls that are stopped anywhere: by an error, or with their process."""

import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from alaya_jax.errors import RemoteError
from alaya_jax.storage.remote import RemoteContexts

GRAPH = [{"neighbours": np.arange(6, dtype=np.int32)}] * 3


class Stopped(Exception):
    pass


def stop_at(count):
    """Raises from the count-th call on, in whatever thread."""
    left, lock = [count], threading.Lock()

    def stop(_):
        with lock:
            left[0] -= 1
            if left[0] < 0:
                raise Stopped

    return stop


def test_a_push_that_is_stopped_at_each_write_is_resumed(watched, open_store, make, same, header):
    """Before the record is there, nobody sees the context; the next push writes what is missing."""
    here, there = open_store(), open_store("there")
    tokens, kv = make(1100)
    id = here.write(header, tokens, kv).id
    here.write_index(id, "graph", {}, GRAPH)
    place = watched()
    names, stops = set(), 0
    while True:
        place.before_put = stop_at(min(stops, 1))  # at once, and then after one more each time
        before = set(place.keys("chunks/"))
        try:
            RemoteContexts(place).push(here, id)
            break
        except Stopped:
            stops += 1
        assert before <= set(place.keys("chunks/"))
        names = set(place.keys("contexts/"))
        found, length = RemoteContexts(place).match(header, tokens)
        assert (found is None, length) == ((False, 1100) if names else (True, 0))
    assert stops >= 6
    assert len(place.keys("chunks/")) == 5
    remote = RemoteContexts(place)
    place.before_put = lambda _: None
    assert remote.push(here, id).chunks == 0
    (moved,) = remote.contexts()
    assert remote.pull(there, moved).chunks == 5
    assert remote.pull_indexes(there, moved) == ["graph"]
    same(there, id, tokens, kv)


def test_a_pull_that_is_stopped_at_each_read_leaves_nothing(
    watched, open_store, make, same, header
):
    here, there, place = open_store(), open_store("there"), watched()
    tokens, kv = make(1100)
    near = make(tokens[:300])
    id = here.write(header, tokens, kv).id
    RemoteContexts(place).push(here, id)
    known = there.write(header, *near).id
    for stops in range(100):
        place.before_read = stop_at(stops)
        try:
            remote = RemoteContexts(place)
            (moved,) = remote.contexts()
            remote.pull(there, moved)
            break
        except Stopped:
            assert [record.id for record in there.list()] == [known]
    place.before_read = lambda _: None
    assert stops >= 7  # the mark, the record, one chunk compared, four read
    same(there, id, tokens, kv)
    left = [path.name for path in there.path.rglob("*")]
    assert not [name for name in left if name.startswith("tmp")]


def test_a_place_that_fails_names_itself(watched, open_store, make, header):
    """What went wrong is said by whoever it happened to, whatever thread it was in."""
    here, place = open_store(), watched()
    id = here.write(header, *make(700)).id

    def fails(key):
        raise RemoteError(f"{place.where}: writing {key} failed")

    place.before_put, before = fails, set(threading.enumerate())
    with pytest.raises(RemoteError, match=r"writing alaya_remote\.json failed"):
        RemoteContexts(place).push(here, id)
    assert not set(threading.enumerate()) - before  # the workers are gone


PUSH = """
    import os, signal, sys, threading
    from pathlib import Path
    from alaya_jax.storage import PoolStore
    from alaya_jax.storage.object_store import SharedStore
    from alaya_jax.storage.remote import RemoteContexts

    path, url, id, writes = sys.argv[1:]
    place, left = SharedStore(url), int(writes)
    put, lock = place.replace, threading.Lock()

    def counted(*arguments):
        global left
        with lock:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return put(*arguments)

    place.replace = counted
    with PoolStore(path) as store:
        print(RemoteContexts(place).push(store, id).chunks)
"""


@pytest.mark.slow
def test_a_push_whose_process_is_killed_is_resumed(
    tmp_path, watched, open_store, make, same, header
):
    """Killed after so many writes, with others on their way; then by a process that is not."""
    here = open_store()
    tokens, kv = make(3000)
    id = here.write(header, tokens, kv).id
    here.close()
    url = f"file://{tmp_path}/shared"

    def push(writes):
        command = [sys.executable, "-c", textwrap.dedent(PUSH), here.path, url, id, str(writes)]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout.strip()

    place = watched(url)
    for writes in (0, 1, 4, 7):
        assert push(writes)[0] == -signal.SIGKILL
        assert RemoteContexts(place).contexts() == []
        assert RemoteContexts(place).problems() == []
    there_already = len(place.keys("chunks/"))
    assert there_already >= 4
    code, chunks = push(1000)
    assert (code, int(chunks)) == (0, 12 - there_already)
    there, remote = open_store("there"), RemoteContexts(place)
    (moved,) = remote.contexts()
    assert remote.pull(there, moved).chunks == 12
    same(there, id, tokens, kv)


PULL = PUSH.replace("place.replace = counted", "place.read = counted").replace(
    "place.replace, threading", "place.read, threading"
)
PULL = PULL[: PULL.index("with PoolStore")] + (
    "with PoolStore(path) as store:\n"
    "        remote = RemoteContexts(place)\n"
    "        remote.pull(store, remote.contexts()[0])\n"
)


@pytest.mark.slow
def test_a_pull_whose_process_is_killed_leaves_nothing(
    tmp_path, watched, open_store, make, same, header
):
    here, there = open_store(), open_store("there")
    tokens, kv = make(3000)
    id = here.write(header, tokens, kv).id
    url = f"file://{tmp_path}/shared"
    RemoteContexts(watched(url)).push(here, id)
    there.close()
    for reads in (3, 9, 1000):
        command = [sys.executable, "-c", textwrap.dedent(PULL), there.path, url, id, reads]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
        there = open_store("there")
        assert [r.id for r in there.list()] == ([id] if reads == 1000 else []), done.stderr
        if reads == 1000:
            same(there, id, tokens, kv)
        else:
            assert done.returncode == -signal.SIGKILL
        assert sum(p.stat().st_size for p in there.path.rglob("*") if "tmp" in p.name) == 0
        there.close()
