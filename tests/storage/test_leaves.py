"""What indexes know of pages, in files of the store: right, or not known. Kind: every way in which
such a file can be wrong; other processes, full disks, missing rights.
"""

import contextlib
import dataclasses
import errno
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from alaya_jax.storage import PoolStore, identity, leaf_file
from alaya_jax.storage.leaf_file import Form
from alaya_jax.storage.leaves import Leaves

MADE = {"index": "Sketch(bits=4)", "version": 1}
ARRAYS = [((16, 4), "uint8"), ((16,), "float16"), ((), "float16"), ((8,), "bfloat16")]


@pytest.fixture
def id(store, kit):
    """A context of 100 tokens: six full pages, and four tokens more."""
    return kit.put(store, 100)


def made(pages, seed=0):
    """Leaves [K, n, ...] of pages, of each array."""
    return [
        np.random.default_rng([seed, i]).integers(1, 99, (2, len(pages), *shape)).astype(dtype)
        for i, (shape, dtype) in enumerate((s, leaf_file._DTYPES[d]) for s, d in ARRAYS)
    ]


def put(mapped, layer=1, count=6, seed=0):
    """Writes those of the first pages."""
    file, pages = mapped.leaves(layer, MADE, ARRAYS), mapped.pages[:count]
    parts = [part[:, :count] for part in made(mapped.pages[:6], seed)]
    assert file.write(pages, mapped.births[:count], parts)
    return file


def known(mapped, layer=1, of=MADE, arrays=ARRAYS, count=6):
    """How many of the first pages the file knows, and that they are those of `put`."""
    file, pages = mapped.leaves(layer, of, arrays), mapped.pages[:count]
    right = file.known(pages, mapped.births[:count])
    for array, part in zip(file.arrays, made(mapped.pages[:6]), strict=True):
        np.testing.assert_array_equal(array[:, pages[right]], part[:, :count][:, right])
    return int(right.sum())


def path_of(store, layer=1):
    (path,) = store.path.glob(f"segments/*/leaves/*/{layer:03d}")
    return path


def test_what_one_wrote_another_knows(store, id, kit):
    with store.mapped(id) as mapped:
        assert known(mapped) == 0
        file = put(mapped)
        assert known(mapped) == 6
        assert known(mapped, layer=0) == 0
        assert [array.shape for array in file.arrays] == [
            (2, 1 << 16, *shape) for shape, _ in ARRAYS
        ]
        assert all(array.ctypes.data % 64 == 0 for array in file.arrays)
        assert not any(array.flags.writeable for array in file.arrays)
        assert not file.arrays[0][:, mapped.pages[6]].any(), "memory of a page nobody asked for"
    path = path_of(store)
    assert path.stat().st_mode & 0o777 == 0o600
    for directory in (path.parent, path.parent.parent):
        assert directory.stat().st_mode & 0o777 == 0o700
    code = """
        with PoolStore(path, read_only=True) as store, store.mapped(sys.argv[2]) as mapped:
            made, arrays = eval(sys.argv[3])
            file = mapped.leaves(1, made, arrays)
            pages = mapped.pages
            known = file.known(pages, mapped.births)
            print(known.sum(), int(sum(a[:, pages].astype(np.float32).sum() for a in file.arrays)))
            print(mapped.resident_bytes())
    """
    for layer in range(3):
        for kind in (0, 1):
            forget(path.parents[2] / f"{'kv'[kind]}.{layer:03d}")
    with kit.run_python(code, store.path, id, repr((MADE, ARRAYS))) as process:
        said = process.stdout.read().split()
    with store.mapped(id) as mapped:
        total = sum(part.astype(np.float32).sum() for part in made(mapped.pages[:6]))
    assert said == ["6", str(int(total)), "0"]


def forget(path):
    """Has the system forget what it holds of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def test_other_settings_have_other_files(store, id):
    others = [
        (MADE | {"version": 2}, ARRAYS),
        (MADE | {"index": "Sketch(bits=2)"}, ARRAYS),
        (MADE, [*ARRAYS[:3], ((8,), "float16")]),
        (MADE, [((16, 4), "int8"), *ARRAYS[1:]]),
    ]
    with store.mapped(id) as mapped:
        put(mapped)
        for of, arrays in others:
            assert known(mapped, of=of, arrays=arrays) == 0
        assert known(mapped) == 6
        of, arrays = others[0]
        file = mapped.leaves(1, of, arrays)
        assert file.write(mapped.pages[:2], mapped.births[:2], made(mapped.pages[:2], 5))
        assert known(mapped) == 6, "side by side"


@pytest.mark.parametrize("region", range(5))
def test_a_bit_that_turns_makes_a_page_unknown(store, id, kit, region):
    with store.mapped(id) as mapped:
        put(mapped)
        slot = int(mapped.pages[3])
        found = Leaves(
            path_of(store).parents[2],
            store._pool.pages(*store._entry(id))[0].layout,
            Form(MADE, ARRAYS),
        )
        regions, _ = found.form.regions(found.layout)
        start, heads, piece = regions[region]
        kit.flip(path_of(store), start + ((heads - 1) * (1 << 16) + slot) * piece + piece // 2)
        file = mapped.leaves(1, MADE, ARRAYS)
        right = file.known(mapped.pages[:6], mapped.births[:6])
        assert right.tolist() == [True, True, True, False, True, True]
        (problem,) = store.check(id) if region else [""]
        assert not region or "Sketch(bits=4) knows of page 3 of context" in problem
        assert "nothing is lost" in problem or not region
        assert put(mapped)
        assert known(mapped) == 6
        assert store.check(id) == []


def test_what_is_torn_moved_or_of_another_is_not_known(store, id, kit):
    with store.mapped(id) as mapped:
        put(mapped)
        data = path_of(store).read_bytes()
        put(mapped, layer=2)
        path_of(store, 2).write_bytes(data)
        assert known(mapped, layer=2) == 0, "another layer's"
        file = mapped.leaves(1, MADE, ARRAYS)
        pages, births = mapped.pages[:6], mapped.births[:6]
        assert not file.known(pages, births + 1).any()
        assert not file.known(pages[::-1], births).any() or (births == births[0]).all()
        store.remove(id)
    new = kit.put(store, 100, seed=1)
    with store.mapped(new) as mapped:
        assert mapped.pages[:6].tolist() == pages.tolist(), "else nothing was shown"
        assert known(mapped) == 0, "another context's, in the same place"


def test_a_kill_between_data_and_checksum_leaves_nothing_known(store, id, monkeypatch):
    real, calls = leaf_file.write_at, []

    def write_at(fd, data, offset):
        calls.append(offset)
        real(fd, data, offset)

    with store.mapped(id) as mapped:
        monkeypatch.setattr(leaf_file, "write_at", write_at)
        file = put(mapped, layer=0)
        assert calls[-1] == mapped.pages[0] * 16, "births and checksums last"
        total = len(calls)
        for stop in (1, total // 2, total - 1):
            calls.clear()

            def killed(fd, data, offset, stop=stop):
                if len(calls) >= stop:
                    raise KeyboardInterrupt
                write_at(fd, data, offset)

            monkeypatch.setattr(leaf_file, "write_at", killed)
            births = mapped.births[:6] + stop
            with pytest.raises(KeyboardInterrupt):
                file.write(mapped.pages[:6], births, made(mapped.pages[:6], 7))
            assert not file.known(mapped.pages[:6], births).any()


def test_who_is_second_keeps_what_the_first_wrote(store, id, monkeypatch):
    """Two processes make the same leaves at once: with other bits it may be, and none is mixed."""
    with store.mapped(id) as mapped, PoolStore(store.path) as again, again.mapped(id) as other:
        mine, theirs = (m.leaves(1, MADE, ARRAYS) for m in (mapped, other))
        pages, births = mapped.pages[:6], mapped.births[:6]
        assert theirs.write(pages[2:], births[2:], [part[:, 2:] for part in made(pages)])
        assert mine.write(pages, births, made(pages, seed=9))
        assert mine.known(pages, births).all()
        for array, first, second in zip(mine.arrays, made(pages), made(pages, 9), strict=True):
            np.testing.assert_array_equal(array[:, pages[2:]], first[:, 2:])
            np.testing.assert_array_equal(array[:, pages[:2]], second[:, :2])
        with leaf_file.alone(theirs._fd):
            monkeypatch.setattr("alaya_jax.storage.lock.SAID_AFTER", 0.05)
            assert not mine.write(pages, births + 1, made(pages))
        assert mine.write(pages, births + 1, made(pages))


WRITER = """
    import random
    kind, seed = sys.argv[3], int(sys.argv[4])
    rng = random.Random(seed)
    arrays = [((64,), "uint8"), ((8, 4), "int8"), ((), "float16")]
    with PoolStore(path) as store, store.mapped(sys.argv[2]) as mapped:
        print("ready", flush=True)
        sys.stdin.readline()
        mine = 0
        for i in range(10_000 if kind == "forever" else 40):
            file = mapped.leaves(0, {"index": "x", "number": i // 4}, arrays)
            some = np.array(sorted(rng.sample(range(62), rng.randrange(1, 40))))
            parts = [np.full((2, len(some), *shape), seed, dtype) for shape, dtype in arrays]
            assert file.write(mapped.pages[some], mapped.births[some], parts)
            known = file.known(mapped.pages, mapped.births)
            assert known[some].all()
            for page in mapped.pages[known]:
                held = [np.unique(array[:, page]) for array in file.arrays]
                assert len({tuple(one.tolist()) for one in held}) == 1, held
                assert len(held[0]) == 1 and held[0][0] in (1, 2, 3, 4), held
                mine += held[0][0] == seed
        print(mine, flush=True)
"""
FORMED = [((64,), "uint8"), ((8, 4), "int8"), ((), "float16")]


def test_processes_that_write_the_same_pages_mix_nothing(store, kit):
    """Kind: four processes, each with bits of its own; whoever is first has the page as a whole."""
    id = kit.put(store, 1000)
    running = [
        kit.run_python(WRITER, store.path, id, "some", seed, stdin=subprocess.PIPE)
        for seed in (1, 2, 3, 4)
    ]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [int(process.communicate()[0] or -1) for process in running]
    assert [process.returncode for process in running] == [0] * 4
    assert sum(count > 0 for count in counts) > 1, "else nobody met another"
    assert store.check(id) == []


def test_row_25_killed_while_it_writes(store, kit):
    """Kind: kill -9 at random moments; what is known afterwards is whole."""
    id, rng = kit.put(store, 1000), np.random.default_rng(0)
    for _ in range(6):
        with kit.run_python(WRITER, store.path, id, "forever", 1, stdin=subprocess.PIPE) as process:
            assert process.stdout.readline() == "ready\n"
            process.stdin.write("go\n")
            process.stdin.flush()
            time.sleep(0.05 + 0.3 * rng.random())
            process.kill()
    seen = 0
    with store.mapped(id) as mapped:
        for number in range(len(list(store.path.glob("segments/*/leaves/*")))):
            file = mapped.leaves(0, {"index": "x", "number": number}, FORMED)
            for page in mapped.pages[file.known(mapped.pages, mapped.births)]:
                assert all((array[:, page] == 1).all() for array in file.arrays)
                seen += 1
    assert seen > 100
    assert len(store.leaves(id)) == 1


def test_threads_that_make_the_same_file_at_once(store, id):
    """Each with a store of its own: all have it."""
    with contextlib.ExitStack() as opened:
        stores = [opened.enter_context(PoolStore(store.path)) for _ in range(6)]
        mapped = [opened.enter_context(one.mapped(id)) for one in stores]
        for number in range(20):
            gate, made = threading.Barrier(len(mapped)), {"index": "x", "number": number}

            def make(one, gate=gate, made=made):
                gate.wait()
                return one.leaves(0, made, FORMED)

            with ThreadPoolExecutor(len(mapped)) as threads:
                files = list(threads.map(make, mapped))
            assert None not in files
            assert not any(file._read_only for file in files)
            assert len({os.fstat(file._fd).st_ino for file in files}) == 1


def test_random_flips(store, id, kit):
    """Whatever bit turns, what is known is right."""
    with store.mapped(id) as mapped:
        put(mapped)
    path, rng, missed = path_of(store), np.random.default_rng(1), 0
    with path.open("rb") as file:
        data = file.read()
    used = np.flatnonzero(np.frombuffer(data, np.uint8))
    for at in rng.choice(used, 60, replace=False):
        bit = int(rng.integers(8))
        kit.flip(path, int(at), bit)
        with PoolStore(store.path, read_only=True) as reader, reader.mapped(id) as mapped:
            missed += known(mapped) == 6
        kit.flip(path, int(at), bit)
    assert missed == 0


def test_a_disk_that_is_full_is_no_error(store, id, monkeypatch):
    real, calls = leaf_file.write_at, []

    def full(fd, data, offset):
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        calls.append(offset)
        real(fd, data, offset)

    with store.mapped(id) as mapped:
        file, pages = mapped.leaves(1, MADE, ARRAYS), mapped.pages[:6]
        with monkeypatch.context() as patch:
            patch.setattr(leaf_file, "write_at", full)
            assert not file.write(pages, mapped.births[:6], made(pages))
        assert len(calls) == 5
        assert not any(array[:, pages].any() for array in file.arrays), "its space is given back"
        assert not file.known(pages, mapped.births[:6]).any()
        assert put(mapped)


def test_a_small_file_system(tmp_path, kit):
    """Kind: a tmpfs of 4 MiB that is full."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode()}")
    try:
        with PoolStore(tmp_path / "db") as store, store.mapped(kit.put(store, 100)) as mapped:
            file = mapped.leaves(1, MADE, ARRAYS)
            with contextlib.suppress(OSError), (tmp_path / "other").open("wb", 0) as other:
                while True:
                    other.write(bytes(4096))
            assert not file.write(mapped.pages[:6], mapped.births[:6], made(mapped.pages[:6]))
            assert not file.known(mapped.pages[:6], mapped.births[:6]).any()
            (tmp_path / "other").unlink()
            put(mapped)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_without_the_right_to_write(store, id):
    with PoolStore(store.path, read_only=True) as reader, reader.mapped(id) as mapped:
        assert mapped.leaves(1, MADE, ARRAYS) is None
        assert not list(store.path.glob("segments/*/leaves"))
        with store.mapped(id) as writer:
            put(writer, count=4)
        assert known(mapped) == 4
        file = mapped.leaves(1, MADE, ARRAYS)
        assert not file.write(mapped.pages[:6], mapped.births[:6], made(mapped.pages[:6]))
        assert known(mapped) == 4


def cut(path):
    os.truncate(path, 100)


def longer(path):
    os.truncate(path, path.stat().st_size + 1)


def linked(path):
    path.rename(path.with_name("away"))
    path.symlink_to(path.with_name("away"))


def a_directory(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [cut, longer, linked, a_directory, a_pipe])
def test_no_file_of_the_right_length_is_no_leaf(store, id, harm):
    with store.mapped(id) as mapped:
        put(mapped)
    harm(path_of(store))
    with PoolStore(store.path, read_only=True) as reader, reader.mapped(id) as mapped:
        assert mapped.leaves(1, MADE, ARRAYS) is None
        (problem,) = reader.check(id)
        assert "001 is no file of what Sketch(bits=4) knows of pages; nothing is lost" in problem
        assert reader.leaves(id) == {}
    with store.mapped(id) as mapped:
        file = mapped.leaves(1, MADE, ARRAYS)
        if harm is a_directory:
            assert file is None
        else:
            assert known(mapped) == 0
            put(mapped)
            assert known(mapped) == 6


def test_a_file_that_is_cut_while_it_is_mapped_is_not_read(store, id):
    with store.mapped(id) as mapped:
        file = put(mapped)
        cut(path_of(store))
        assert not file.known(mapped.pages[:6], mapped.births[:6]).any()
        assert not file.write(mapped.pages[:6], mapped.births[:6], made(mapped.pages[:6]))


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"[]",
        b"[" * 60_000,
        b'{"version": 1, "made": {"index": "x"}, "arrays": [[[1099511627776], "uint8"]]}',
        b'{"version": 1, "made": {"index": "x"}, "arrays": [[[2147483647, 2147483647], "uint8"]]}',
        b'{"version": 1, "made": {"index": "x"}, "arrays": [[[-1], "uint8"]]}',
        b'{"version": 1, "made": {"index": "x"}, "arrays": [[[4], "object"]]}',
        b'{"version": 1, "made": {"index": 5}, "arrays": []}',
        b'{"version": 2, "made": {"index": "x"}, "arrays": []}',
    ],
)
def test_what_is_not_of_this_form_is_named_and_goes(store, id, meta, tmp_path):
    with store.mapped(id) as mapped:
        put(mapped)
    folder = path_of(store).parents[1]
    (folder / identity.digest(meta)).mkdir()
    (folder / identity.digest(meta) / "meta.json").write_bytes(meta)
    (folder / "link").symlink_to(tmp_path)
    (tmp_path / "kept").touch()
    assert len([p for p in store.check(id) if "holds no leaves of an index" in p]) == 2
    store.gc()
    assert len(list(folder.iterdir())) == 1
    assert (tmp_path / "kept").exists()
    assert store.check(id) == []
    with store.mapped(id) as mapped:
        assert known(mapped) == 6


def test_a_link_in_place_of_the_folder(store, id, tmp_path):
    with store.mapped(id) as mapped:
        put(mapped)
        folder = path_of(store).parents[1]
        folder.rename(tmp_path / "away")
        folder.symlink_to(tmp_path / "away")
        assert mapped.leaves(1, MADE, ARRAYS) is None
        assert "holds no leaves" in store.check(id)[0]
        store.gc()
        assert not folder.is_symlink()
        assert (tmp_path / "away").exists()
        put(mapped)


def test_space_is_counted_and_given_back_with_the_pages(store, kit):
    header = dataclasses.replace(kit.HEADER, page_size=16)
    ids = [kit.put(store, 6400, header, seed=seed) for seed in range(2)]
    arrays = [((4096,), "uint8")]
    page = 2 * 4096
    assert store.stats().bytes_leaves == 0
    for id in ids:
        with store.mapped(id) as mapped:
            file = mapped.leaves(0, MADE, arrays)
            parts = [np.ones((2, 400, 4096), np.uint8)]
            assert file.write(mapped.pages, mapped.births, parts)
        assert store.leaves(id) == {"Sketch(bits=4)": 400 * page}
    both = store.stats().bytes_leaves
    assert 800 * page <= both < 801 * page + (64 << 10)
    store.remove(ids[0])
    assert store.stats().bytes_leaves <= both - 399 * page
    assert store.leaves(ids[1]) == {"Sketch(bits=4)": 400 * page}
    with store.mapped(ids[1]) as mapped:
        assert mapped.leaves(0, MADE, arrays).known(mapped.pages, mapped.births).all()
    store.remove(ids[1])
    store.gc()
    assert store.stats().bytes_leaves == 0
    assert not list(store.path.glob("segments/*"))
