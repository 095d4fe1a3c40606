"""What nobody holds any more: pages, segments, indexes, leases. Done under the writers' lock."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alaya_jax.errors import ContextError
from alaya_jax.storage import leaves
from alaya_jax.storage.catalogue import CatalogueFile, Snapshot
from alaya_jax.storage.interface import Collected, StoreStats
from alaya_jax.storage.lock import lease_file, unused
from alaya_jax.storage.placing import held
from alaya_jax.storage.pool import Pool
from alaya_jax.storage.rows import Damage, Entry
from alaya_jax.storage.slots import free_slots


def removed(pool: Pool) -> tuple[int, int]:
    """Frees the pages of removed contexts that nobody reads: how many, and how many are read."""
    path, catalogue = pool.path, pool.catalogue
    before = catalogue.snapshot()
    gone = [entry for entry in before.contexts.values() if entry.removed]
    if not gone:
        return 0, 0
    with contextlib.ExitStack() as leases:
        files = {entry.serial: lease_file(path, entry.serial) for entry in gone}
        free = [e for e in gone if leases.enter_context(unused(files[e.serial]))]
        names = []
        with catalogue.changing() as change:
            for entry in free:
                for key, index in change.indexes(entry.serial).items():
                    names.append(index.name)
                    change.delete("indexes", key)
                change.delete("contexts", entry.serial)
        for entry in free:
            files[entry.serial].unlink(missing_ok=True)
    for name in names:
        shutil.rmtree(path / "indexes" / name, ignore_errors=True)
    for number in {entry.segment for entry in free}.intersection(before.segments):
        with contextlib.suppress(ContextError):
            pool.segment(number, before).punch(_free(catalogue, number))
    return len(free), len(gone) - len(free)


def everything(pool: Pool) -> Collected:
    """All that nobody holds, whoever left it; see `Collected`."""
    path, catalogue = pool.path, pool.catalogue
    bytes_before = on_disk(path)
    contexts, in_use = removed(pool)
    snapshot = catalogue.snapshot()
    used = {entry.segment for entry in snapshot.contexts.values()}
    empty = [number for number in snapshot.segments if number not in used]
    with catalogue.changing() as change:
        for number in empty:
            change.delete("segments", number)
        for key, damage in snapshot.damage.items():
            if not _is_held(catalogue, snapshot, damage):
                change.delete("damage", key)
    for directory in _others(path / "segments", {str(n) for n in used}):
        shutil.rmtree(directory)
    indexes = _orphan_indexes(path, catalogue)
    serials = {*snapshot.contexts, *snapshot.unreadable}
    for lease in _others(path / "leases", {lease_file(path, s).name for s in serials}):
        with unused(lease) as free:
            if free:
                lease.unlink(missing_ok=True)
    for number in used.intersection(snapshot.segments):
        segment = pool.segment(number, snapshot)
        for path in leaves.others(segment.directory, segment.layout):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    holes = free_space(pool)
    catalogue.tidy()
    return Collected(
        contexts=contexts,
        in_use=in_use,
        segments=len(empty),
        indexes=indexes,
        bytes_before=bytes_before,
        bytes_after=on_disk(path),
        holes=holes,
    )


def free_space(pool: Pool) -> bool:
    """Punches holes where pages are that nobody holds; False where the file system cannot."""
    snapshot, holes = pool.catalogue.snapshot(), True
    for number in snapshot.segments:
        with contextlib.suppress(ContextError):
            holes &= pool.segment(number, snapshot).punch(_free(pool.catalogue, number))
    return holes


def stats(pool: Pool, bytes_indexes: int) -> StoreStats:
    """What a database holds; what its indexes take is given."""
    catalogue, snapshot = pool.catalogue, pool.catalogue.snapshot()
    there = snapshot.there.values()
    bytes_held = bytes_shared = bytes_free = 0
    for number, layout in snapshot.segments.items():
        live = [_slots(catalogue, snapshot, e) for e in there if e.segment == number]
        listed = sum(map(len, live))
        distinct = len(np.unique(np.concatenate([*live, np.zeros(0, np.int32)])))
        bytes_held += listed * layout.page_bytes
        bytes_shared += (listed - distinct) * layout.page_bytes
        bytes_free += len(_free(catalogue, number)) * layout.page_bytes
    return StoreStats(
        contexts=len(there),
        tokens=sum(entry.num_tokens for entry in there),
        bytes_held=bytes_held,
        bytes_shared=bytes_shared,
        bytes_indexes=bytes_indexes,
        bytes_leaves=sum(map(on_disk, pool.path.glob(f"segments/*/{leaves.FOLDER}"))),
        bytes_free=bytes_free,
        bytes_on_disk=on_disk(pool.path),
        removed=sum(entry.removed for entry in snapshot.contexts.values()),
    )


def on_disk(path: Path) -> int:
    """What the files of a directory take."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            total += file.lstat().st_blocks * 512
    return total


def _free(catalogue: CatalogueFile, number: int) -> np.ndarray:
    snapshot = catalogue.snapshot()
    return free_slots(held(snapshot, catalogue, number), snapshot.segments[number].num_pages)


def _slots(catalogue: CatalogueFile, snapshot: Snapshot, entry: Entry) -> np.ndarray:
    try:
        return catalogue.pages(entry, snapshot.segments[entry.segment].num_pages).slots
    except ContextError:
        return np.zeros(0, np.int32)


def _is_held(catalogue: CatalogueFile, snapshot: Snapshot, damage: Damage) -> bool:
    for entry in snapshot.contexts.values():
        if entry.segment == damage.segment in snapshot.segments:
            with contextlib.suppress(ContextError):
                pages = catalogue.pages(entry, snapshot.segments[entry.segment].num_pages)
                if ((pages.slots == damage.slot) & (pages.births == damage.birth)).any():
                    return True
    return False


def _orphan_indexes(path: Path, catalogue: CatalogueFile) -> int:
    """Deletes index directories that no context has, and nobody is writing; how many."""
    known = {index.name for index in catalogue.snapshot().indexes.values()}
    count = 0
    for directory in _others(path / "indexes", known):
        with unused(directory) as free:
            # Perhaps its writer came to an end just now.
            now = {index.name for index in catalogue.snapshot().indexes.values()}
            if free and directory.name not in now:
                shutil.rmtree(directory, ignore_errors=True)
                count += 1
    return count


def _others(directory: Path, known: set[str]) -> Iterator[Path]:
    """What is in a directory beside what is known. Links are taken away, and not followed."""
    for found in sorted(directory.iterdir()):
        if found.is_symlink():
            found.unlink()
        elif found.name not in known:
            yield found
