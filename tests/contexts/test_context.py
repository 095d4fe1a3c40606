"""A context's handle: what it shares with a prompt, how far it is exact, what it refuses."""

import contextlib
import copy
import pickle
import sqlite3

import numpy as np
import pytest

from alaya_jax.contexts.context import Context
from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage import ContextHeader, PoolStore


@pytest.fixture
def make(tmp_path):
    """Stores tokens with keys and values of one layer, and makes the handle."""
    store = PoolStore(tmp_path / "db")

    def made(tokens, origin=(), title=""):
        header = ContextHeader(
            fingerprint="f",
            dtype="float32",
            num_layers=1,
            num_kv_heads=1,
            head_dim=2,
            page_size=16,
            origin=origin,
            title=title,
        )
        tokens = np.asarray(tokens, np.int32)
        written = store.write(
            header, tokens, lambda start: [np.zeros((2, 1, len(tokens) - start, 2), np.float32)]
        )
        return Context(written, store)

    yield made
    store.close()


def test_what_it_shares_with_a_prompt(make):
    context = make([1, 2, 3, 4])
    assert context.shared(np.array([1, 2, 3, 4, 5])) == 4
    assert context.shared(np.array([1, 2, 9, 4])) == 2
    assert context.shared(np.array([1, 2])) == 2
    assert context.shared(np.array([9])) == 0


def test_only_what_is_exact_is_shared_unless_the_rest_is_asked_for(make):
    context = make([1, 2, 3, 4], origin=((3, "TopK(k=2)"),))
    prompt = np.array([1, 2, 3, 4])
    assert context.exact_tokens == 3
    assert context.shared(prompt) == 3
    assert context.shared(prompt, exact=False) == 4
    assert "the first 3 exact" in repr(context)


def test_a_damaged_one_shares_nothing_and_says_why(make, tmp_path):
    context = make([1, 2, 3, 4])
    with contextlib.closing(sqlite3.connect(tmp_path / "db" / "catalogue.sqlite")) as catalogue:
        catalogue.execute("UPDATE lists SET tokens = zeroblob(16)")
        catalogue.commit()
    assert context.shared(np.array([1, 2, 3])) == 0
    assert "its token ids in catalogue.sqlite do not match their checksum" in context.problem
    with pytest.raises(ContextError, match="token ids"):
        context.tokens  # noqa: B018 - raises


def test_no_graph_until_one_is_stored(make):
    context = make([1, 2, 3])
    assert context.indexes == ()
    assert not context.has_graph


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_cannot_be_copied(make, copied):
    context = make([1, 2, 3])
    with pytest.raises(RequestError, match=f"pass its id, '{context.id}'"):
        copied(context)


def test_it_says_its_name_and_length(make):
    context = make([1, 2, 3], title="a document")
    assert repr(context) == f"Context('a document', 3 tokens, on disk, {context.id})"
