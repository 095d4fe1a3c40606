"""The files of one context: what was written is read, and any wrong byte is found."""

import dataclasses
import json

import numpy as np
import pytest

from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage.files import BLOCK, StoredContext, write_context
from alaya_jax.storage.interface import DTYPES, ContextHeader, ContextRecord

N, LAYERS, HEADS, DIM = BLOCK + 5, 2, 3, 4
HEADER = ContextHeader(
    fingerprint="f",
    dtype="bfloat16",
    num_layers=LAYERS,
    num_kv_heads=HEADS,
    head_dim=DIM,
    page_size=16,
    origin=((9, "TopK"),),
)
RECORD = ContextRecord(id="one", header=HEADER, num_tokens=N, created=12.5)


@pytest.fixture
def kv(rng):
    numbers = rng.standard_normal((LAYERS, 2, HEADS, N, DIM))
    return numbers.astype(DTYPES["bfloat16"])


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "one"
    path.mkdir()
    return path


@pytest.fixture
def written(directory, kv):
    write_context(directory, RECORD, np.arange(N), kv)
    return directory


def test_what_was_written_is_read(written, kv):
    stored = StoredContext(written)
    assert stored.record == RECORD
    np.testing.assert_array_equal(stored.tokens(), np.arange(N))
    for layer in range(LAYERS):
        for start, end in ((0, None), (0, 7), (BLOCK - 2, BLOCK + 2), (4, 4)):
            k, v = stored.read_kv(layer, start, end)
            np.testing.assert_array_equal(k, kv[layer, 0][:, start:end])
            np.testing.assert_array_equal(v, kv[layer, 1][:, start:end])
    assert stored.check() == []


def test_progress_is_told_layer_by_layer(directory, kv):
    told = []
    write_context(directory, RECORD, np.arange(N), kv, lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("range_", [(2, 0, 1), (-1, 0, 1), (0, 3, 2), (0, 0, N + 1)])
def test_what_is_not_there_is_refused_with_what_is(written, range_):
    with pytest.raises(RequestError, match=f"has layers 0 to 1 and {N} tokens"):
        StoredContext(written).read_kv(*range_)


def test_a_wrong_byte_spoils_its_block_and_no_other(written):
    """Values of the second block of layer 1: layer 0, keys, and the first block are still given."""
    file = written / "layer_001.kv"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    stored = StoredContext(written)
    assert stored.record.problem is None, "only reading every byte tells"
    stored.read_kv(0, 0, None)
    stored.read_kv(1, 0, BLOCK)
    with pytest.raises(ContextError, match=r"values of tokens 256 to 260 of layer 1"):
        stored.read_kv(1, BLOCK, None)
    (problem,) = stored.check()
    assert "values of tokens 256 to 260 of layer 1" in problem


@pytest.mark.parametrize("name", ["tokens.npy", "checksums.npy", "layer_000.kv", "meta.json"])
def test_a_file_that_is_missing_is_the_records_problem(written, name):
    (written / name).unlink()
    stored = StoredContext(written)
    assert name in stored.record.problem
    with pytest.raises(ContextError):
        stored.tokens()
    assert stored.check() == [stored.record.problem]


def test_a_meta_that_was_edited_is_not_believed(written):
    meta = json.loads((written / "meta.json").read_text())
    meta["header"]["fingerprint"] = "another"
    (written / "meta.json").write_text(json.dumps(meta))
    assert "does not match its checksum" in StoredContext(written).record.problem


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda kv: kv[:1], "kv ended after 1 layers"),
        (lambda kv: [*kv, kv[0]], "goes on after the 2 layers"),
        (lambda kv: kv.astype(np.float32), "k of layer 0 is float32"),
        (lambda kv: kv[..., :-1, :], r"the tokens say bfloat16 \[3, 261, 4\]"),
        (lambda kv: [1, 2], "no pair of keys and values"),
    ],
)
def test_what_the_header_does_not_say_is_not_written(directory, kv, change, said):
    with pytest.raises(RequestError, match=said):
        write_context(directory, RECORD, np.arange(N), change(kv))
    assert not (directory / "meta.json").exists(), "nothing vouches for it"


def test_another_directorys_meta_is_not_this_ones(written, tmp_path):
    moved = written.rename(tmp_path / "two")
    assert "its directory" in StoredContext(moved).record.problem
    assert dataclasses.replace(StoredContext(moved).record, problem=None).id == "two"
