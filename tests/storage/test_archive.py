"""Contexts in one file: verified, streamed, and refused by name when hostile."""

import hashlib
import os
import stat
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alaya_jax.errors import AlayaError, ContextError, DatabaseError
from alaya_jax.storage import archive
from alaya_jax.storage.archive import ArchiveReader, ArchiveWriter
from alaya_jax.storage.remote import RemoteContexts

MARK = b"alaya contexts 1\n"


@pytest.fixture(params=["float32", "int8"])
def exported(request, tmp_path, open_store, make, kit, header):
    """A file of one context with an index, and what is in it."""
    here, file, header = open_store(), tmp_path / "one.alaya", kit.stored_in(request.param, header)
    tokens, kv = make(300, header)
    id = here.write(header, tokens, kv).id
    here.write_index(id, "graph", {"degree": 4}, [{"n": np.arange(5, dtype=np.int32)}] * 3)
    with ArchiveWriter(file) as place:
        RemoteContexts(place).push(here, id)
    return file, id, tokens, kv


def sealed(body):
    """A file that is whole by its checksum."""
    return body + hashlib.sha256(body).digest()


def entry(name, data=b"x", name_size=None, size=None):
    lengths = (len(name) if name_size is None else name_size, len(data) if size is None else size)
    return struct.pack("<IQ", *lengths) + name + data


def end(count):
    return struct.pack("<IQ", 0, count)


def take(file, store):
    with ArchiveReader(file) as place:
        remote = RemoteContexts(place)
        if problems := remote.problems():
            raise ContextError("; ".join(problems))
        for moved in remote.contexts():
            remote.pull(store, moved)
            remote.pull_indexes(store, moved)


@pytest.mark.smoke
def test_a_context_goes_through_a_file(exported, open_store, same):
    file, id, tokens, kv = exported
    there, done = open_store("there"), []
    with ArchiveReader(file, done.append) as place:
        remote = RemoteContexts(place)
        (moved,) = remote.contexts()
        assert remote.pull(there, moved).chunks == 2
        assert remote.pull_indexes(there, moved) == ["graph"]
    assert sum(done) == file.stat().st_size - 32
    same(there, id, tokens, kv)
    assert there.indexes(id)["graph"].settings == {"degree": 4}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_contexts_share_chunks_in_a_file(tmp_path, open_store, make, header):
    here, file = open_store(), tmp_path / "two.alaya"
    tokens, _ = make(600)
    ids = [here.write(header, *make(tokens[:n])).id for n in (600, 512)]
    with ArchiveWriter(file) as place:
        assert [RemoteContexts(place).push(here, id).chunks for id in ids] == [3, 0]
    there = open_store("there")
    take(file, there)
    assert {r.id for r in there.list()} == set(ids)


def test_what_fails_leaves_no_file(tmp_path, open_store, make, header):
    file = tmp_path / "one.alaya"
    file.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), ArchiveWriter(file) as place:
        place.put("chunks/00/00", bytes(1 // 0))
    assert file.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["one.alaya"]
    with pytest.raises(DatabaseError, match="No such file or directory"), ArchiveWriter("/no/x"):
        pass
    with pytest.raises(DatabaseError, match="cannot be read"):
        ArchiveReader(tmp_path / "nothing")


def test_a_full_disk_leaves_no_file(tmp_path, open_store, make, header, monkeypatch):
    here, file = open_store(), tmp_path / "one.alaya"
    id = here.write(header, *make(300)).id
    write, left = os.write, [3]

    def full(fd, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr("alaya_jax.storage.archive.os.write", full)
    full_disk = pytest.raises(DatabaseError, match=r"No space left on device.*room")
    with full_disk, ArchiveWriter(file) as place:
        RemoteContexts(place).push(here, id)
    assert not list(tmp_path.glob("*alaya*"))


def test_a_file_cut_anywhere_or_with_any_byte_changed_is_refused(exported, open_store):
    file, *_ = exported
    whole, there = file.read_bytes(), open_store("there")
    step = max(1, len(whole) // 150)
    for at in [*range(60), *range(60, len(whole) - 60, step), *range(len(whole) - 60, len(whole))]:
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        for data in (bytes(changed), whole[:at], whole[:at] + whole[at + 1 :], whole + whole[:at]):
            if data == whole:
                continue
            file.write_bytes(data)
            with pytest.raises(ContextError, match=str(file)):
                take(file, there)
            assert there.list() == []
    file.write_bytes(whole)
    take(file, there)
    assert len(there.list()) == 1


NAME = b"chunks/00/" + b"0" * 64


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (entry(b"../../../etc/cron.d/x") + end(1), "is no name of an object"),
        (entry(b"/etc/passwd") + end(1), "is no name of an object"),
        (entry(b"chunks/../x") + end(1), "is no name of an object"),
        (entry(b"chunks/00/x\0y") + end(1), "is no name of an object"),
        (entry(b"contexts/\xff\xfe/00") + end(1), "is no name of an object"),
        (entry(b"chunks/" + b"0" * 300) + end(1), "length"),
        (entry(NAME, size=1 << 63) + end(1), "length"),
        (entry(NAME, size=2**64 - 1) + end(1), "length"),
        (entry(NAME, name_size=2**32 - 1) + end(1), "length"),
        (entry(NAME, size=30) + end(1), "length"),
        (entry(NAME) * 2 + end(2), "twice"),
        (entry(NAME) + end(2), "another number"),
        (entry(NAME) + end(1 << 60), "another number"),
        (entry(NAME) + end(1) + b"more", "another number"),
        (entry(NAME), "ends too early"),
        (entry(NAME)[:5], "ends too early"),
        (b"", "ends too early"),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path, body, said):
    """Their checksums are right: whoever writes a file can make them so."""
    file = tmp_path / "x.alaya"
    file.write_bytes(sealed(MARK + body))
    with pytest.raises(ContextError, match=said) as error:
        ArchiveReader(file)
    assert str(file) in str(error.value)


def test_too_many_objects_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MOST_OBJECTS", 3)
    file = tmp_path / "x.alaya"
    names = [b"chunks/00/%064d" % i for i in range(4)]
    file.write_bytes(sealed(MARK + b"".join(map(entry, names[:3])) + end(3)))
    ArchiveReader(file).close()
    file.write_bytes(sealed(MARK + b"".join(map(entry, names)) + end(4)))
    with pytest.raises(ContextError, match="more than 3 objects"):
        ArchiveReader(file)


def test_other_files_are_told_apart(tmp_path):
    file = tmp_path / "x"
    for data in (b"", b"PK\3\4" + b"x" * 100, MARK[:5], b"alaya contexts 9\n" + b"x" * 100):
        file.write_bytes(data)
        with pytest.raises(ContextError, match="does not hold contexts"):
            ArchiveReader(file)
    file.write_bytes(MARK)
    with pytest.raises(ContextError, match="does not match its checksum"):
        ArchiveReader(file)


pieces = st.one_of(
    st.binary(max_size=40),
    st.builds(
        entry,
        st.sampled_from([NAME, b"contexts/00/00", b"alaya_remote.json", b"../x", b""]),
        st.binary(max_size=20),
        st.one_of(st.none(), st.integers(0, 2**32 - 1)),
        st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    ),
    st.builds(end, st.integers(0, 5)),
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(pieces, max_size=5))
def test_any_file_is_taken_or_refused_by_name(tmp_path, open_store, pieces):
    file, there = tmp_path / "x.alaya", open_store("fuzzed")
    file.write_bytes(sealed(MARK + b"".join(pieces)))
    said = None
    try:
        take(file, there)
    except AlayaError as error:
        said = str(error)
    assert said is None or str(file) in said
    assert there.list() == []
    there.close()


def test_a_whole_file_of_a_changed_context_is_refused(exported, open_store):
    """Objects swapped or damaged under a checksum that was made right again."""
    file, *_ = exported
    there = open_store("there")
    with ArchiveReader(file) as place:
        held = {key: place.read(key).data for key in place.keys("")}
    chunks = [key for key in held if key.startswith("chunks/")]
    (record,) = [key for key in held if key.startswith("contexts/")]
    changes = [
        {chunks[0]: held[chunks[1]], chunks[1]: held[chunks[0]]},
        {chunks[0]: b""},
        {chunks[0]: held[record]},
        {record: held[chunks[0]]},
        {record: held[record][:-1]},
    ]
    for change in [*changes, {chunks[0]: None}]:
        with ArchiveWriter(file) as place:
            for key, data in (held | change).items():
                if data is not None:
                    place.put(key, data)
        with pytest.raises(ContextError, match=str(file)):
            take(file, there)
        assert there.list() == []
