"""The files of a stored index: damage is the index's own, and building it again is the way out."""

import json

import numpy as np
import pytest

from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage import checked
from alaya_jax.storage.files import make_directory
from alaya_jax.storage.index_files import StoredIndex, write_index

LAYERS = [
    {"near": np.arange(6).reshape(2, 3), "entry": np.array([1], ">i4")},
    {"near": np.arange(4)},
]


@pytest.fixture
def written(tmp_path):
    """A directory, and the checksum of its meta.json."""
    make_directory(tmp_path / "one")
    return tmp_path / "one", write_index(tmp_path / "one", "graph", {"degree": 3}, LAYERS)


def test_what_was_written_is_read(written):
    index = StoredIndex(written[0], "graph", "context a", written[1])
    assert (index.record.kind, dict(index.record.settings)) == ("graph", {"degree": 3})
    assert index.record.problem is None
    for layer, arrays in enumerate(LAYERS):
        read = index.read(layer)
        assert read.keys() == arrays.keys()
        for name in arrays:
            np.testing.assert_array_equal(read[name], arrays[name])
    assert read["near"].dtype.byteorder in "<=", "little-endian, whatever was given"
    assert index.check() == []
    with pytest.raises(RequestError, match="the graph index has no layer 2"):
        index.read(2)


def test_large_arrays_are_mapped_once_they_were_verified(written, monkeypatch):
    monkeypatch.setattr(checked, "MAPPED", 1)
    verified = set()
    first = StoredIndex(written[0], "graph", "context a", written[1], verified)
    near = first.read(0)["near"]
    assert isinstance(near, np.memmap)
    assert not near.flags.writeable
    assert len(verified) == 2
    again = StoredIndex(written[0], "graph", "context a", written[1], verified)
    monkeypatch.setattr("zlib.crc32", None)  # not read again
    np.testing.assert_array_equal(StoredIndex._layer(again, 0, mapped=True)["near"], near)


def test_a_wrong_byte_is_found_when_its_layer_is_read(written, kit):
    kit.flip(written[0] / "layer_001_near.npy", -1)
    index = StoredIndex(written[0], "graph", "context a in b", written[1])
    index.read(0)
    with pytest.raises(
        ContextError, match=r"graph index of context a in b .*layer_001_near.* \(db\.build_index"
    ):
        index.read(1)
    assert len(index.check()) == 1


def test_a_missing_file_is_the_records_problem(written):
    (written[0] / "layer_000_near.npy").unlink()
    index = StoredIndex(written[0], "graph", "context a", written[1])
    assert "layer_000_near.npy is missing" in index.record.problem
    with pytest.raises(ContextError, match="missing"):
        index.read(1)
    assert index.check() == [index.record.problem]


def test_another_meta_than_the_one_that_was_written_is_refused(written, tmp_path):
    """Though its own checksum is right."""
    make_directory(tmp_path / "two")
    write_index(tmp_path / "two", "graph", {"degree": 4}, LAYERS)
    (tmp_path / "two" / "meta.json").replace(written[0] / "meta.json")
    index = StoredIndex(written[0], "graph", "context a", written[1])
    assert "is not the one that was written" in index.record.problem


@pytest.mark.parametrize(
    "files",
    [
        {"../../secret.npy": [9, 9]},
        {"layer_000_near.npy": [9, "9"]},
        {"layer_x_near.npy": [9, 9]},
        {"other.npy": [9, 9]},
        {"/etc/passwd": [9, 9]},
        {"layer_000_near.npy": 9},
        [],
    ],
    ids=str,
)
def test_a_hostile_meta_is_refused(written, files):
    """Its checksum is right: somebody made it."""
    meta = {"version": 1, "kind": "graph", "settings": {}, "files": files}
    meta["checksum"] = checked._meta_checksum(meta)
    (written[0] / "meta.json").write_text(json.dumps(meta))
    problem = StoredIndex(written[0], "graph", "context a").record.problem
    assert "cannot be understood" in problem


def test_links_are_not_followed(written, tmp_path):
    file = written[0] / "layer_000_near.npy"
    file.replace(tmp_path / "elsewhere.npy")
    file.symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(ContextError, match="cannot be read"):
        StoredIndex(written[0], "graph", "context a", written[1]).read(0)
