"""Databases and contexts, ways to do damage, other processes, and a shared store under watch."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from alaya_jax.at_rest import encoded
from alaya_jax.storage import ContextHeader, PoolStore

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture
def header() -> ContextHeader:
    """Of a model that has two kv heads, as many as a layer has halves (keys and values)."""
    return ContextHeader(
        fingerprint="model-1",
        dtype="float32",
        num_layers=3,
        num_kv_heads=2,
        head_dim=8,
        page_size=16,
        title="a title with ümlaut",
    )


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens databases in a directory of the test's own; they are closed at its end."""
    opened = []

    def open(name: str = "here") -> PoolStore:
        opened.append(PoolStore(tmp_path / name))
        return opened[-1]

    yield open
    for store in opened:
        store.close()


@pytest.fixture
def make(header: ContextHeader) -> Callable[..., Any]:
    """Tokens [n] and keys and values of each layer, pairs of [K, n, D].

    Equal tokens from the first on have equal numbers, as those of one model do.
    """

    def make(tokens: Any, of: ContextHeader = header) -> tuple[np.ndarray, list[Any]]:
        if isinstance(tokens, int):
            tokens = np.random.default_rng(0).integers(0, 1000, tokens)
        tokens = np.asarray(tokens, np.int32)
        n, dtype = len(tokens), DTYPES[of.dtype]
        seen = np.cumsum(tokens.astype(np.float64) * (1 + np.arange(n))) % 1009
        axes = np.ix_(np.arange(of.num_kv_heads), np.arange(n), np.arange(of.head_dim))
        kv = [
            tuple(
                (np.sin(axes[0] + 3 * axes[2] + layer + 7 * half) * seen[None, :, None]).astype(
                    dtype
                )
                for half in range(2)
            )
            for layer in range(of.num_layers)
        ]
        if of.store_dtype:
            kv = [tuple(encoded(half, of.store_dtype) for half in pair) for pair in kv]
        return tokens, kv

    return make


@pytest.fixture
def same(open_store: Callable[..., Any]) -> Callable[..., None]:
    """Asserts that a context of a store is what was made."""

    def same(store: Any, id: str, tokens: np.ndarray, kv: list[Any]) -> None:
        np.testing.assert_array_equal(store.tokens(id), tokens, strict=True)
        for layer, pair in enumerate(kv):
            for found, want in zip(store.read_kv(id, layer), pair, strict=True):
                np.testing.assert_array_equal(found, want[:, : len(tokens)], strict=True)
        assert store.check(id) == []

    return same


class Watched:
    """An object store that counts what is done with another, and fails where a test says so."""

    def __init__(self, inner: Any):
        self.inner, self.where = inner, inner.where
        self.read_keys: list[str] = []
        self.put_keys: list[str] = []
        self.before_put: Callable[[str], None] = lambda key: None
        self.before_read: Callable[[str], None] = lambda key: None

    def read(self, key: str) -> Any:
        self.before_read(key)
        self.read_keys.append(key)
        return self.inner.read(key)

    def begins(self, key: str, count: int) -> Any:
        self.before_read(key)
        return self.inner.begins(key, count)

    def put(self, key: str, data: bytes) -> bool:
        self.before_put(key)
        self.put_keys.append(key)
        return self.inner.put(key, data)

    def replace(self, key: str, data: bytes, version: bytes) -> bool:
        self.before_put(key)
        self.put_keys.append(key)
        return self.inner.replace(key, data, version)

    def keys(self, prefix: str) -> list[str]:
        return self.inner.keys(prefix)

    def chunks_read(self) -> int:
        return sum(key.startswith("chunks/") for key in self.read_keys)

    def chunks_put(self) -> int:
        return sum(key.startswith("chunks/") for key in self.put_keys)


@pytest.fixture
def watched(tmp_path: Path) -> Callable[..., Watched]:
    """Opens a shared store, whose use is watched, in memory or at a URL."""
    from alaya_jax.storage.object_store import SharedStore

    def watched(url: str | None = None) -> Watched:
        return Watched(SharedStore(url or f"memory://{tmp_path.as_posix()[1:]}/"))

    return watched


@pytest.fixture
def other(header: ContextHeader) -> Callable[..., ContextHeader]:
    """The header with other fields."""
    return lambda **fields: dataclasses.replace(header, **fields)


HEADER = ContextHeader(
    fingerprint="f" * 64,
    dtype="float32",
    num_layers=3,
    num_kv_heads=2,
    head_dim=8,
    page_size=16,
    title="a title with ümlaut",
)


def _make(count, header=HEADER, seed=0):
    """Tokens [n] and kv, a list of L pairs of [K, n, D]."""
    rng = np.random.default_rng(seed)
    shape = (header.num_kv_heads, count, header.row_width)

    def half():
        if header.store_dtype:
            return rng.integers(0, 256, shape, np.uint8)
        return rng.normal(size=shape).astype(DTYPES[header.dtype])

    kv = [tuple(half() for _ in "kv") for _ in range(header.num_layers)]
    return rng.integers(0, 1000, count).astype(np.int32), kv


def stored_in(kind, header=HEADER):
    """A header of keys and values that rest in another dtype."""
    if kind in DTYPES:
        return dataclasses.replace(header, dtype=kind)
    origin = ((0, f"storage in {kind}"), *header.origin)
    return dataclasses.replace(header, store_dtype=kind, origin=origin)


def source(kv, starts=None):
    """A `Source` of these layers; notes from where on it is asked for them."""

    def given(start):
        if starts is not None:
            starts.append(start)
        return ((np.asarray(k)[:, start:], np.asarray(v)[:, start:]) for k, v in kv)

    return given


def put(store, count=20, header=HEADER, seed=0):
    """Stores a context of so many tokens; its id."""
    tokens, kv = _make(count, header, seed)
    return store.write(header, tokens, source(kv)).id


def must_not_run(start):
    raise AssertionError("nothing of it was to be read")


def flip(path, offset, bit=4):
    """Turns one bit of a file, in place."""
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        at = file.tell()
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def flip_page(store, id, layer, kind, token, head=0):
    """Turns a bit of what a token has in a layer, of its keys (0) or values (1)."""
    snapshot, entry = store._pool.entry(id)
    segment, pages = store._pool.pages(snapshot, entry)
    layout = segment.layout
    slot, inside = pages.slots[token // layout.page_size], token % layout.page_size
    at = (head * layout.num_pages + slot) * layout.piece
    flip(segment.file(layer, kind), int(at + inside * layout.piece // layout.page_size))


def run_python(code, *arguments, **popen):
    """Another process of this Python; `code` runs after the imports."""
    head = """
        import dataclasses, os, signal, sys, time
        from pathlib import Path
        import numpy as np
        from alaya_jax.errors import AlayaError, ContextError, DatabaseError
        from alaya_jax.storage import ContextHeader, PoolStore
        path = Path(sys.argv[1])
        header = ContextHeader(fingerprint="f", dtype="float32", num_layers=3, num_kv_heads=2,
                               head_dim=8, page_size=16)
        def make(count, seed=0, header=header):
            rng = np.random.default_rng(seed)
            shape = header.num_kv_heads, count, header.row_width
            half = lambda: (rng.integers(0, 256, shape, np.uint8) if header.store_dtype else
                            rng.normal(size=shape).astype(np.float32))
            kv = [tuple(half() for _ in "kv") for _ in range(header.num_layers)]
            return rng.integers(0, 1000, count).astype(np.int32), kv
        def source(kv):
            return lambda start: ((k[:, start:], v[:, start:]) for k, v in kv)
    """
    code = textwrap.dedent(head) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        **popen,
    )


@pytest.fixture(scope="session")
def kit():
    """What the tests of the store share."""
    functions = (source, put, stored_in, must_not_run, flip, flip_page, run_python)
    return SimpleNamespace(HEADER=HEADER, make=_make, **{f.__name__: f for f in functions})


@pytest.fixture
def store(tmp_path):
    with PoolStore(tmp_path / "db") as store:
        yield store


@pytest.fixture
def whole():
    """Asserts that a context of a store has just these keys and values, and that all is well."""

    def check(store, id, tokens, kv):
        np.testing.assert_array_equal(store.tokens(id), tokens)
        for layer, (k, v) in enumerate(kv):
            got_k, got_v = store.read_kv(id, layer)
            np.testing.assert_array_equal(got_k, k)
            np.testing.assert_array_equal(got_v, v)
        assert store.check(id) == []

    return check
