"""Shared stores behind URLs: in memory, in a directory, and on an S3 server of this machine."""

import contextlib
import http.server
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest

from alaya_jax.errors import RemoteError, RequestError
from alaya_jax.storage import objects
from alaya_jax.storage.object_store import TIMEOUT, ObjectStore, SharedStore
from alaya_jax.storage.remote import RemoteContexts


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(port, *command):
    """Runs a server of this machine until the block ends; it answers when the block begins."""
    server = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert server.poll() is None
            time.sleep(0.1)
        else:
            pytest.fail(f"{command[0]} did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def s3_server():
    """The address of an S3 server with a bucket."""
    port = free_port()
    with serving(port, "moto.server", "-H", "127.0.0.1", "-p", str(port)) as address:
        bucket = urllib.request.Request(f"{address}/contexts", method="PUT")
        urllib.request.urlopen(bucket).close()
        yield address


@pytest.fixture(scope="module")
def gcs_server():
    """The address of a GCS server with a bucket. It ignores the conditions of writes."""
    port = free_port()
    command = ("gcp_storage_emulator", "start", "--host=127.0.0.1", f"--port={port}")
    with serving(port, *command, "--in-memory", "--default-bucket=contexts") as address:
        yield address


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """A URL of the test's own on that server, and credentials in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return f"s3://contexts/{tmp_path.name}"


@pytest.fixture(params=["memory", "file", "s3"])
def url(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return f"{request.param}://{tmp_path}/shared"


def test_an_object_is_written_once(url):
    store: ObjectStore = SharedStore(url)
    assert store.where == url
    assert store.read("a/b") is None
    assert store.begins("a/b", 3) is None
    assert store.put("a/b", b"first")
    assert not store.put("a/b", b"second")
    assert not SharedStore(url).put("a/b", b"second")
    found = store.read("a/b")
    assert found.data == b"first"
    assert [store.begins("a/b", n) for n in (0, 2, 5, 9)] == [b"", b"fi", b"first", b"first"]
    assert store.replace("a/b", b"third", found.version)
    assert not store.replace("a/b", b"fourth", found.version)
    assert store.read("a/b").data == b"third"
    store.put("a/a", b"")
    store.put("b", b"x")
    assert store.keys("a/") == ["a/a", "a/b"]
    assert store.keys("c/") == []
    assert store.begins("a/a", 0) == store.begins("a/a", 4) == b""


def test_of_many_writers_one_is_first(url):
    stores, won, start = [SharedStore(url) for _ in range(8)], [], threading.Barrier(8)

    def write(i):
        start.wait()
        if stores[i].put("name", b"%d" % i):
            won.append(b"%d" % i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert stores[0].read("name").data == won[0]


@pytest.fixture
def gs(gcs_server, monkeypatch, tmp_path):
    """A URL of the test's own on that server, which asks for no credentials."""
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", gcs_server)
    return f"gs://contexts/{tmp_path.name}"


@pytest.mark.parametrize("kind", ["memory", "file", "s3", "gs"])
def test_contexts_move_through_it(kind, request, tmp_path, open_store, make, same, header):
    local = f"{kind}://{tmp_path}/shared"
    url = request.getfixturevalue(kind) if kind in ("s3", "gs") else local
    here, there = open_store(), open_store("there")
    tokens, kv = make(600)
    id = here.write(header, tokens, kv).id
    here.write_index(id, "graph", {"degree": 4}, [{"n": np.arange(9, dtype=np.int32)}] * 3)
    assert RemoteContexts(SharedStore(url)).push(here, id).chunks == 3
    remote = RemoteContexts(SharedStore(url + "/"))
    moved, length = remote.match(header, np.append(tokens, 1).astype(np.int32))
    assert (moved.id, length) == (id, 600)
    remote.pull(there, moved)
    remote.pull_indexes(there, moved)
    same(there, id, tokens, kv)
    assert remote.push(there, id).chunks == 0

    place = SharedStore(url)
    key = objects.chunk_key(moved.chunks[1])
    found = place.read(key)
    place.replace(key, found.data[:-1] + b"\0", found.version)
    assert remote.push(here, id, repair=True).chunks == 1
    assert place.read(key).data == found.data


@pytest.mark.slow
def test_many_objects_are_listed(s3):
    """More than a server lists in one answer."""
    store = SharedStore(s3)
    keys = [f"a/{i:04d}" for i in range(1100)]
    done = [store._kv.write(key, b"") for key in keys]
    for future in done:
        future.result()
    assert store.keys("a/") == keys


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://host/x", "begins with file://"),
        ("/shared/directory", "begins with file://"),
        ("s3", "begins with file://"),
        ("file://host/x", "authority"),
        ("s3://", "bucket"),
        ("s3://B/x", "bucket"),
        ("file:///x|zip:", "begins with file://"),
        ("file:///x?y", "Query"),
    ],
)
def test_other_urls_are_refused(url, said):
    with pytest.raises(RequestError, match=said) as error:
        SharedStore(url)
    assert url in str(error.value)


@pytest.mark.parametrize("seconds", ["-1", "0", "soon", "inf", "nan"])
def test_the_timeout_is_seconds(monkeypatch, seconds):
    monkeypatch.setenv(TIMEOUT, seconds)
    with pytest.raises(RequestError, match=TIMEOUT):
        SharedStore("memory://x/")


def refuses(store, *said):
    """Each request fails within seconds, with an error that names the URL, and says so."""
    begun = time.monotonic()
    for request in (
        lambda: store.read("a"),
        lambda: store.keys("a"),
        lambda: store.put("a", b"x"),
        lambda: store.begins("a", 3),
    ):
        with pytest.raises(RemoteError) as error:
            request()
        for text in (store.where, *said):
            assert text in str(error.value)
    assert time.monotonic() - begun < 30


@pytest.mark.slow
def test_a_server_that_is_not_there(s3, monkeypatch):
    endpoint = "http://127.0.0.1:14031"  # a port is no status, whatever its digits are
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    refuses(SharedStore(s3), endpoint, "AWS_ENDPOINT_URL", "can be reached")


def test_a_server_that_does_not_answer(s3, monkeypatch):
    monkeypatch.setenv(TIMEOUT, "0.5")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        refuses(SharedStore(s3), endpoint, TIMEOUT, "longer than 0.5 s")


class Denies(http.server.BaseHTTPRequestHandler):
    def refuse(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        said = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said)

    do_GET = do_PUT = do_HEAD = refuse

    def log_message(self, *_):
        pass


def test_a_server_that_denies(s3, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Denies) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        refuses(SharedStore(s3), "must be allowed there", "AWS_SECRET_ACCESS_KEY")
        server.shutdown()


def test_credentials_are_those_of_the_environment(s3, monkeypatch, tmp_path):
    """A file that other programs read is not asked."""
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    refuses(SharedStore(s3), "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def test_a_bucket_that_is_not_there(s3, open_store, make, header):
    here, store = open_store(), SharedStore(s3.replace("contexts", "nothing-here"))
    id = here.write(header, *make(5)).id
    with pytest.raises(RemoteError, match="no such bucket"):
        RemoteContexts(store).push(here, id)


def test_a_directory_that_cannot_be_made():
    with pytest.raises(RemoteError, match="give the URL of a directory"):
        SharedStore("file:///proc/shared").put("a/b", b"x")


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "shared").write_text("x")
    with pytest.raises(RemoteError, match="give the URL of a directory"):
        SharedStore(f"file://{tmp_path}/shared").put("a", b"x")
