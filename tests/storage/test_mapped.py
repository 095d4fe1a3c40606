"""Pages that are read where they lie: mapped, verified piece by piece, and kept while leased."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage import MappedContext, PoolStore


@pytest.fixture
def made(kit, store):
    """The id, tokens and kv of a context of 100 tokens."""
    tokens, kv = kit.make(100)
    return store.write(kit.HEADER, tokens, kit.source(kv)).id, tokens, kv


def gathered(mapped, layer, count):
    """Keys and values [K, n, D] of the first tokens."""
    halves = (half[:, mapped.pages] for half in mapped.layer(layer))
    return [half.reshape(len(half), -1, half.shape[-1])[:, :count] for half in halves]


def test_pages_are_those_of_the_engine(store, made):
    id, _, kv = made
    with store.mapped(id) as mapped:
        same: MappedContext = mapped  # checked by the type checker too
        assert same.pages.dtype == np.int32
        assert len(mapped.pages) == 7
        for layer, pair in enumerate(kv):
            k, v = mapped.layer(layer)
            assert k.shape == v.shape == (2, 1 << 16, 16, 8)
            assert not k.flags.writeable
            assert k.ctypes.data % 64 == v.ctypes.data % 64 == 0
            mapped.verify(layer, mapped.pages)
            for got, want in zip(gathered(mapped, layer, 100), pair, strict=True):
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_enter_a_program_without_a_copy(kit, store, dtype):
    jax = pytest.importorskip("jax")
    header = dataclasses.replace(kit.HEADER, dtype=dtype)
    id = kit.put(store, 100, header)
    with store.mapped(id) as mapped:
        k, _ = mapped.layer(0)
        put = jax.device_put(k, jax.devices("cpu")[0])
        assert put.unsafe_buffer_pointer() == k.ctypes.data
        assert put.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        del put


def test_a_damaged_page_is_named_and_the_others_are_not(kit, store, made, whole):
    id, _, _ = made
    kit.flip_page(store, id, layer=1, kind=1, token=50, head=1)
    with store.mapped(id) as mapped:
        others = np.delete(mapped.pages, 3)
        for layer in (0, 2):
            mapped.verify(layer, mapped.pages)
        mapped.verify(1, others)
        where = (
            rf"context {id} in .* is damaged: the values of tokens 48 to 63 of layer 1 "
            rf"\(page {mapped.pages[3]} of segments/\d+/v\.001\)"
        )
        for _ in range(2):
            with pytest.raises(ContextError, match=where):
                mapped.verify(1, mapped.pages[[5, 3]])


def test_only_what_is_asked_is_verified(kit, store, made):
    """Of keys or values, of one head: a search that read no more asks for no more."""
    id, _, _ = made
    kit.flip_page(store, id, layer=1, kind=1, token=50, head=1)
    with store.mapped(id) as mapped:
        asked = np.ones((2, kit.HEADER.num_kv_heads, len(mapped.pages)), bool)
        asked[1, 1, 3] = False
        mapped.verify(1, mapped.pages, asked)
        order = [5, 3, 3, 0]
        mapped.verify(1, mapped.pages[order], asked[..., order])
        some = np.zeros((2, kit.HEADER.num_kv_heads, len(order)), bool)
        mapped.verify(1, mapped.pages[order], some)
        some[1, 1, 2] = True
        with pytest.raises(ContextError, match=r"the values of tokens 48 to 63 of layer 1"):
            mapped.verify(1, mapped.pages[order], some)


def test_a_page_is_verified_once(kit, store, made, monkeypatch):
    """By a process, for all contexts that share it; and again when another write made it."""
    id, tokens, _ = made
    shorter = store.write(kit.HEADER, tokens[:64], kit.must_not_run).id
    with store.mapped(id) as mapped, store.mapped(shorter) as other:
        mapped.verify(0, mapped.pages)
        monkeypatch.setattr("alaya_jax.storage.checksums.of_pages", None)
        mapped.verify(0, mapped.pages[::-1])
        other.verify(0, other.pages)
        with pytest.raises(TypeError):
            other.verify(1, other.pages[:1])
        monkeypatch.undo()
        slots = mapped.pages.copy()
    store.remove(id)
    store.remove(shorter)
    new = kit.put(store, 100, seed=1)
    kit.flip_page(store, new, layer=0, kind=0, token=3)
    with store.mapped(new) as mapped:
        assert (mapped.pages == slots).all()
        with pytest.raises(ContextError, match="tokens 0 to 15"):
            mapped.verify(0, mapped.pages)


def test_what_is_removed_stays_while_it_is_read(kit, store, made, whole):
    """Rows 8, 9 and 24: nobody's pages are given to another while they are read, for how long so
    ever; a store of another process counts too (test_processes).
    """
    id, tokens, kv = made
    with store.mapped(id) as mapped:
        with store.mapped(id) as second:
            store.remove(id)
            with pytest.raises(ContextError, match="no context"):
                store.mapped(id)
            assert store.gc().in_use == 1
            others = [kit.put(store, 100, seed=i) for i in range(1, 4)]
            again = store.write(kit.HEADER, tokens, kit.source(kv)).id
            second.verify(0, second.pages)
        assert store.stats().removed == 1
        for layer, pair in enumerate(kv):
            mapped.verify(layer, mapped.pages)
            for got, want in zip(gathered(mapped, layer, 100), pair, strict=True):
                np.testing.assert_array_equal(got, want)
        taken = set(mapped.pages.tolist())
        for other in (*others, again):
            with store.mapped(other) as there:
                assert not taken & set(there.pages.tolist())
    assert store.gc().contexts == 1
    assert store.stats().removed == 0
    whole(store, again, tokens, kv)


def test_closed_and_wrong_arguments(kit, store, made):
    mapped = store.mapped(made[0])
    with pytest.raises(RequestError, match="page 99 is not one of context"):
        mapped.verify(0, [99])
    with pytest.raises(RequestError, match="page 70000 is not one of context"):
        mapped.read_ahead(0, [int(mapped.pages[0]), 70000])
    with pytest.raises(RequestError, match="layers 0 to 2, and not 3"):
        mapped.layer(3)
    mapped.close()
    mapped.close()
    with pytest.raises(ContextError, match="is closed; map it again"):
        mapped.layer(0)


def test_memory_is_read_ahead_let_go_and_counted(kit, store, made, whole):
    id, tokens, kv = made
    nbytes = 7 * 2 * 3 * 2 * 16 * 8 * 4
    with store.mapped(id) as mapped:
        for layer in range(3):
            mapped.read_ahead(layer, mapped.pages)
            mapped.verify(layer, mapped.pages)
        assert mapped.resident_bytes() == nbytes
        for layer in range(3):
            mapped.let_go(layer, mapped.pages[2:])
            mapped.let_go(layer, [])
        for got, want in zip(gathered(mapped, 1, 100), kv[1], strict=True):
            np.testing.assert_array_equal(got, want)
    whole(store, id, tokens, kv)


def test_a_file_that_was_cut_is_an_error_and_no_crash(kit, tmp_path):
    with PoolStore(tmp_path / "db") as store:
        id = kit.put(store, 100)
    (file,) = store.path.glob("segments/*/v.002")
    with PoolStore(store.path) as store, store.mapped(id) as mapped:
        with file.open("r+b") as f:
            f.truncate(100)
        with pytest.raises(ContextError, match=r"v\.002 has 100 bytes instead of"):
            mapped.verify(2, mapped.pages)
        mapped.verify(1, mapped.pages)
        for use in (lambda: store.mapped(id), lambda: store.read_kv(id, 2)):
            with pytest.raises(ContextError, match=r"v\.002 has 100 bytes instead of"):
                use()
        assert "v.002 has 100 bytes" in store.list()[0].problem
