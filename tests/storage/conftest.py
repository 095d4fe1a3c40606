"""A small context, its keys and values as a source, other processes, and ways to do damage."""

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest

from alaya_jax.storage import ContextHeader, PoolStore
from alaya_jax.storage.interface import DTYPES

HEADER = ContextHeader(
    fingerprint="f" * 64,
    dtype="float32",
    num_layers=3,
    num_kv_heads=2,
    head_dim=8,
    page_size=16,
    title="a title with ümlaut",
)


def make(count, header=HEADER, seed=0):
    """Tokens [n] and kv, a list of L pairs of [K, n, D]."""
    rng = np.random.default_rng(seed)
    shape = (header.num_kv_heads, count, header.head_dim)
    kv = [
        tuple(rng.normal(size=shape).astype(DTYPES[header.dtype]) for _ in "kv")
        for _ in range(header.num_layers)
    ]
    return rng.integers(0, 1000, count).astype(np.int32), kv


def source(kv, starts=None):
    """A `Source` of these layers; notes from where on it is asked for them."""

    def given(start):
        if starts is not None:
            starts.append(start)
        return ((np.asarray(k)[:, start:], np.asarray(v)[:, start:]) for k, v in kv)

    return given


def put(store, count=20, header=HEADER, seed=0):
    """Stores a context of so many tokens; its id."""
    tokens, kv = make(count, header, seed)
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
    snapshot, entry = store._entry(id)
    segment, pages = store._pages(snapshot, entry)
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
            shape = header.num_kv_heads, count, header.head_dim
            kv = [tuple(rng.normal(size=shape).astype(np.float32) for _ in "kv")
                  for _ in range(header.num_layers)]
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
    names = (HEADER, make, source, put, must_not_run, flip, flip_page, run_python)
    return SimpleNamespace(HEADER=HEADER, **{f.__name__: f for f in names[1:]})


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
