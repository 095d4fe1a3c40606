"""`alaya db push`, `pull`, `sync`, `export` and `import`: contexts between databases. No model is
loaded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alaya_jax.cli import options
from alaya_jax.cli.database import chosen, open_store
from alaya_jax.cli.terminal import note, on_interrupt, report
from alaya_jax.errors import ContextError
from alaya_jax.progress import progress_bar
from alaya_jax.units import nbytes

if TYPE_CHECKING:
    from alaya_jax.storage import ContextStore
    from alaya_jax.storage.remote import RemoteContexts

_URL = typer.Argument(
    metavar="URL", help="The shared store: file:///shared/directory/, s3://bucket/path/ or gs://..."
)
_IDS = typer.Argument(metavar="ID...", help="Ids, or beginnings; without any: all contexts.")
_DRY_RUN = typer.Option("--dry-run", help="Only say what would be moved.")
_REPAIR = typer.Option(
    "--repair", help="Read what is there, and write anew what is damaged or gone."
)
_MEND = typer.Option("--repair", help="Check what the database has, and take anew what is damaged.")


def push(
    url: Annotated[str, _URL],
    ids: Annotated[list[str] | None, _IDS] = None,
    db: options.Database = None,
    repair: Annotated[bool, _REPAIR] = False,
    dry_run: Annotated[bool, _DRY_RUN] = False,
    json: options.Json = False,
) -> None:
    """Give contexts of a database to a shared store.

    Other databases pull them from there. What is there is not written again: equal beginnings are
    stored once. A push that is interrupted goes on where it was.

    Examples:
      alaya db push file:///shared/contexts/
      alaya db push s3://bucket/contexts/ 3f2a91 --db contexts.db
    """
    with open_store(db, read_only=True) as store:
        _move(db, store, _remote(url), ("push",), ids, json, repair=repair, dry_run=dry_run)


def pull(
    url: Annotated[str, _URL],
    ids: Annotated[list[str] | None, _IDS] = None,
    db: options.Database = None,
    repair: Annotated[bool, _MEND] = False,
    dry_run: Annotated[bool, _DRY_RUN] = False,
    json: options.Json = False,
) -> None:
    """Take contexts from a shared store into a database.

    A database that is not there is made. What the database has is not read again.

    Examples:
      alaya db pull file:///shared/contexts/ --dry-run
      alaya db pull s3://bucket/contexts/ 3f2a91 --db contexts.db
    """
    remote = _remote(url)
    with _taking(db, dry_run) as store:
        _move(db, store, remote, ("pull",), ids, json, repair=repair, dry_run=dry_run)


def sync(
    url: Annotated[str, _URL],
    ids: Annotated[list[str] | None, _IDS] = None,
    db: options.Database = None,
    dry_run: Annotated[bool, _DRY_RUN] = False,
    json: options.Json = False,
) -> None:
    """Pull what a shared store has, and push what it has not.

    Examples:
      alaya db sync file:///shared/contexts/
      alaya db sync s3://bucket/contexts/ --db contexts.db --json
    """
    remote = _remote(url)
    with _taking(db, dry_run) as store:
        _move(db, store, remote, ("pull", "push"), ids, json, dry_run=dry_run)


def export(
    id: Annotated[str, typer.Argument(metavar="ID", help="Its id, or a beginning of it.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    db: options.Database = None,
    json: options.Json = False,
) -> None:
    """Write a context and its indexes to one file.

    `alaya db import` takes it into another database.

    Examples:
      alaya db export 3f2a91 document.alaya
      alaya db export 3f2a document.alaya --db contexts.db
    """
    from alaya_jax.storage.archive import ArchiveWriter
    from alaya_jax.storage.remote import RemoteContexts

    with open_store(db, read_only=True) as store:
        (record,) = chosen(store.list(), [id], store.path)
        with (
            on_interrupt("No file was written."),
            ArchiveWriter(file) as place,
            progress_bar("exporting", record.nbytes, "bytes") as advance,
        ):
            RemoteContexts(place).push(store, record.id, advance=advance)
        size = file.stat().st_size
        note(f"Exported {record.id}: {record.num_tokens:,} tokens, {nbytes(size)}.")
        if json:
            told = {"context": record.id, "tokens": record.num_tokens, "bytes": size}
            report({"database": str(store.path), "file": str(file)} | told)


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Of `alaya db export`.")],
    db: options.Database = None,
    json: options.Json = False,
) -> None:
    """Take the contexts of a file into a database.

    A database that is not there is made. The file is verified before anything of it is taken.

    Examples:
      alaya db import document.alaya
      alaya db import document.alaya --db contexts.db --json
    """
    from alaya_jax.storage.archive import ArchiveReader
    from alaya_jax.storage.remote import RemoteContexts

    size = file.stat().st_size if file.is_file() else 0
    with progress_bar("verifying", size, "bytes") as advance:
        place = ArchiveReader(file, advance)
    with place, open_store(db, read_only=False, make=True) as store:
        _move(db, store, RemoteContexts(place), ("pull",), None, json)


@contextmanager
def _taking(db: Path | None, dry_run: bool) -> "Iterator[ContextStore]":
    """The database that contexts go to; a dry run of one that is not there makes it elsewhere."""
    path = options.database_path(db)
    if not dry_run or path.exists():
        with open_store(db, read_only=dry_run, make=not dry_run) as store:
            yield store
        return
    with (
        TemporaryDirectory() as empty,
        open_store(Path(empty), read_only=False, make=True) as store,
    ):
        yield store


def _remote(url: str) -> "RemoteContexts":
    from alaya_jax.storage.object_store import SharedStore
    from alaya_jax.storage.remote import RemoteContexts

    return RemoteContexts(SharedStore(url))


def _move(
    db: Path | None,
    store: "ContextStore",
    remote: "RemoteContexts",
    ways: Sequence[str],
    ids: list[str] | None,
    json: bool,
    *,
    repair: bool = False,
    dry_run: bool = False,
) -> None:
    """Moves contexts one after another, and reports. One that cannot be moved does not keep the
    others; a place that cannot be reached does.
    """
    here = {record.id: record for record in store.list()}
    there = {moved.id: moved for moved in remote.contexts()}
    sides = {"push": (here, there, options.database_path(db)), "pull": (there, here, remote.where)}
    if ids:
        known = {id: context for way in ways for id, context in sides[way][0].items()}
        where = " and ".join(str(sides[way][2]) for way in ways)
        meant = {context.id for context in chosen(list(known.values()), ids, where)}
    else:
        meant = here.keys() | there.keys()
    unreadable = remote.problems() if "pull" in ways else []
    failed: list[dict[str, Any]] = [{"id": None, "problem": problem} for problem in unreadable]
    done: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for way in ways:
        have, have_already, _ = sides[way]
        for id, context in have.items():
            if id not in meant or (dry_run and id in have_already):
                continue
            title = context.header.title if context.header else ""
            told = {"id": id, "title": title, "tokens": context.num_tokens, "bytes": context.nbytes}
            try:
                told |= {} if dry_run else _one(store, remote, way, context, repair)
            except ContextError as error:
                failed.append({"id": id, "problem": str(error)})
            else:
                done[way].append(told)
                note(_said(way, told))
    for failure in failed:
        note(f"Failed: {failure['problem']}")
    if json:
        place = {
            "database": str(options.database_path(db)),
            "remote": remote.where,
            "dry_run": dry_run,
        }
        report(place | {f"{way}ed": rows for way, rows in done.items()} | {"failed": failed})
    elif not failed and not any(done.values()):
        note(f"There is nothing to {' or '.join(ways)}.")
    if failed:
        raise typer.Exit(1)


def _one(
    store: "ContextStore", remote: "RemoteContexts", way: str, context: Any, repair: bool
) -> dict[str, Any]:
    """Moves one context; what was really moved."""
    bar = progress_bar(f"{way}ing {context.id[:8]}", context.nbytes, "bytes")
    if way == "push":
        with (
            on_interrupt("What was written stays, and the next push goes on from there."),
            bar as advance,
        ):
            pushed = remote.push(store, context.id, repair=repair, advance=advance)
        chunks, moved, indexes = pushed.chunks, pushed.nbytes, list(pushed.indexes)
    else:
        with on_interrupt("Nothing of this context was stored."):
            with bar as advance:
                here = any(record.id == context.id for record in store.list())
            anew = here and repair and bool(store.check(context.id))
            pulled = remote.pull(store, context, anew=anew, advance=advance)
            chunks, moved = pulled.chunks, pulled.nbytes
            indexes = remote.pull_indexes(store, context)
    return {"chunks_moved": chunks, "bytes_moved": moved, "indexes_moved": indexes}


def _said(way: str, told: dict[str, Any]) -> str:
    title = f"  {told['title']}" if told["title"] else ""
    size = f"{told['id']}: {told['tokens']:,} tokens, {nbytes(told['bytes'])}"
    if "chunks_moved" not in told:
        return f"Would {way} {size}.{title}"
    if not told["chunks_moved"] and not told["indexes_moved"]:
        return f"Was there: {size}.{title}"
    index = "".join(f", {kind} index" for kind in told["indexes_moved"])
    return f"{way.capitalize()}ed {size}, {nbytes(told['bytes_moved'])} moved{index}.{title}"
