"""Databases and contexts for tests of what moves between them."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from alaya_jax.storage import ContextHeader, DirectoryStore

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

    def open(name: str = "here") -> DirectoryStore:
        opened.append(DirectoryStore(tmp_path / name))
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
