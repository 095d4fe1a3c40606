"""Names and bytes of the objects that a context is."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_jax.errors import ContextError
from alaya_jax.storage import ContextHeader, objects

HEADER = ContextHeader(
    fingerprint="model", dtype="float32", num_layers=2, num_kv_heads=2, head_dim=4, page_size=16
)

texts = st.text(max_size=6)
headers = st.builds(
    ContextHeader,
    fingerprint=texts,
    namespace=texts,
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 3),
    page_size=st.integers(1, 3),
    origin=st.lists(st.tuples(st.integers(0, 3), texts), max_size=2).map(tuple),
    title=texts,
)
tokens = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(lambda x: np.asarray(x, np.int32))


@pytest.mark.smoke
@settings(max_examples=300)
@given(headers, headers, tokens, tokens)
def test_row_15_contexts_share_a_name_only_if_they_are_the_same(one, other, these, those):
    same = dataclasses.replace(one, title="", origin=()) == dataclasses.replace(
        other, title="", origin=()
    )
    assert (objects.group(one) == objects.group(other)) == same

    def until(header, ids):
        return [run for run in header.origin if run[0] < len(ids)]

    same = same and until(one, these) == until(other, those)
    same = same and np.array_equal(these, those)
    names = [objects.chunk_names(one, these), objects.chunk_names(other, those)]
    assert (names[0] == names[1]) == same


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_a_digest_knows_where_its_parts_end(one, other):
    assert (objects.digest(*one) == objects.digest(*other)) == (one == other)


def test_row_15_a_namespace_does_not_run_into_what_stands_beside_it():
    one = dataclasses.replace(HEADER, namespace="org_1", fingerprint="2345")
    other = dataclasses.replace(HEADER, namespace="org_12345", fingerprint="")
    assert objects.group(one) != objects.group(other)
    assert objects.chunk_names(one, np.arange(9)) != objects.chunk_names(other, np.arange(9))


def test_a_chunk_is_named_by_all_that_came_before():
    ids = np.arange(1000, dtype=np.int32)
    names = objects.chunk_names(HEADER, ids)
    assert len(set(names)) == len(names) == 4
    assert objects.chunk_names(HEADER, ids[:768]) == names[:3]
    changed = ids.copy()
    changed[300] = 0
    found = objects.chunk_names(HEADER, changed)
    assert objects.shared_chunks(names, found) == 1
    assert not set(names[1:]) & set(found)
    repeated = objects.chunk_names(HEADER, np.zeros(512, np.int32))
    assert repeated[0] != repeated[1]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "fp8"])
@pytest.mark.parametrize("count", [1, 7, 256])
def test_a_chunk_comes_back(kit, dtype, count):
    header = kit.stored_in(dtype, HEADER)
    random = np.random.default_rng(count)
    numbers = random.uniform(0, 200, objects.chunk_shape(header, count))
    numbers = numbers.astype(header.row_dtype)
    ids = random.integers(0, 1000, count).astype(np.int32)
    data = objects.write_chunk(header, 512, ids, numbers)
    assert len(data) == objects.chunk_nbytes(header, 512, count)
    got_ids, got = objects.read_chunk(data, header, 512, count)
    np.testing.assert_array_equal(got_ids, ids, strict=True)
    np.testing.assert_array_equal(got, numbers, strict=True)


def test_every_byte_of_a_chunk_is_looked_at():
    numbers = np.ones(objects.chunk_shape(HEADER, 3), np.float32)
    data = objects.write_chunk(HEADER, 0, np.arange(3), numbers)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(ContextError):
            objects.read_chunk(bytes(changed), HEADER, 0, 3)
        with pytest.raises(ContextError):
            objects.read_chunk(data[:at], HEADER, 0, 3)


def test_axes_of_equal_length_are_not_taken_for_each_other():
    """Row 7: with as many heads as tokens, the shapes alone would agree."""
    one = dataclasses.replace(HEADER, num_kv_heads=4, num_layers=2)
    other = dataclasses.replace(HEADER, num_kv_heads=2, num_layers=4)
    data = objects.write_chunk(one, 0, np.arange(4), np.ones((2, 2, 4, 4, 4), np.float32))
    assert len(data) == objects.chunk_nbytes(other, 0, 4)
    with pytest.raises(ContextError, match="of another model, layout or place"):
        objects.read_chunk(data, other, 0, 4)


RECORD = objects.MovedContext(
    id="ab12", header=HEADER, num_tokens=300, created=5.0, chunks=("0" * 64, "1" * 64)
)


def test_a_record_comes_back():
    header = dataclasses.replace(HEADER, origin=((3, "DIPR"),), namespace="ü", title="t")
    record = dataclasses.replace(RECORD, header=header)
    assert objects.read_record(objects.write_record(record)) == record


@pytest.mark.parametrize(
    "fields",
    [
        {"num_tokens": 1 << 60},
        {"num_tokens": 0},
        {"num_tokens": True},
        {"num_tokens": 300.0},
        {"chunks": ["../../../../etc/passwd", "1" * 64]},
        {"chunks": ["0" * 64] * 3},
        {"chunks": 5},
        {"id": "../x"},
        {"id": ""},
        {"id": 7},
        {"header": {}},
        {"header": dataclasses.asdict(HEADER) | {"num_layers": -1}},
        {"header": dataclasses.asdict(HEADER) | {"surprise": 1}},
        {"created": "x"},
    ],
)
def test_records_that_contradict_themselves_are_refused(fields):
    told = dataclasses.asdict(RECORD) | fields
    with pytest.raises(ContextError, match="cannot be understood"):
        objects.read_record(objects.write_plain(b"alaya record 1\n", told))


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_by_name(data):
    for read in (
        objects.read_record,
        lambda x: objects.read_chunk(x, HEADER, 0, 3),
        lambda x: objects.read_record(objects._sealed(b"alaya record 1\n", x)),
        lambda x: objects.read_chunk(objects._sealed(b"alaya chunk 1\n", x), HEADER, 0, 3),
    ):
        with pytest.raises(ContextError):
            read(data)
