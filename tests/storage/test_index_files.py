"""The files of a stored index: damage is the index's own, and building it again is the way out."""

import numpy as np
import pytest

from alaya_jax.errors import ContextError, RequestError
from alaya_jax.storage.index_files import StoredIndex, stored_indexes, write_index

LAYERS = [
    {"near": np.arange(6).reshape(2, 3), "entry": np.array([1], ">i4")},
    {"near": np.arange(4)},
]


@pytest.fixture
def context(tmp_path):
    path = tmp_path / "contexts" / "one"
    for kind in ("graph", "other"):
        (path / f"index_{kind}").mkdir(parents=True)
        write_index(path / f"index_{kind}", kind, {"degree": 3}, LAYERS)
    return path


def test_what_was_written_is_read(context):
    found = stored_indexes(context)
    assert list(found) == ["graph", "other"]
    index = found["graph"]
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


def test_a_wrong_byte_is_found_when_its_layer_is_read(context):
    file = context / "index_graph" / "layer_001_near.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    index = stored_indexes(context)["graph"]
    index.read(0)
    with pytest.raises(
        ContextError, match=r"graph index of context one in .*layer_001_near.* \(db\.build_index"
    ):
        index.read(1)
    assert len(index.check()) == 1
    assert stored_indexes(context)["other"].check() == []


def test_a_missing_file_is_the_records_problem(context):
    (context / "index_graph" / "layer_000_near.npy").unlink()
    index = StoredIndex(context / "index_graph")
    assert "layer_000_near.npy is missing" in index.record.problem
    with pytest.raises(ContextError, match="missing"):
        index.read(1)
    assert index.check() == [index.record.problem]
