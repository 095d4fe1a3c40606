"""`alaya db`: look after a database of contexts. Only `index` loads a model."""

import dataclasses
import re
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alaya_jax.cli import options
from alaya_jax.cli.terminal import help_text, note, on_interrupt, report, say
from alaya_jax.errors import ContextError
from alaya_jax.units import nbytes

if TYPE_CHECKING:
    from alaya_jax.storage import ContextRecord, PoolStore

commands = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, check, index, keep and remove stored contexts.",
)

_ID = typer.Argument(metavar="ID", help="Its id, or a beginning that only one context has.")
_IDS = typer.Argument(metavar="ID...", help="Ids, or beginnings that only one context has.")


def ls(db: options.Database = None, json: options.Json = False) -> None:
    """List the contexts of a database.

    Of each: id, tokens, size, when it was stored, title, and the model that made it.

    Examples:
      alaya db ls
      alaya db ls --db contexts.db --json
    """
    with open_store(db, read_only=True) as store:
        data = describe(store)
    if json:
        report(data)
    else:
        say(table(data))


def show(id: Annotated[str, _ID], db: options.Database = None, json: options.Json = False) -> None:
    """Show all that is known of a context.

    Examples:
      alaya db show 3f2a91
    """
    with open_store(db, read_only=True) as store:
        (record,) = chosen(store.list(), [id], store.path)
        data = _row(store, record)
        data["leaves"] = {} if record.header is None else dict(store.leaves(record.id))
    if json:
        report({"database": str(store.path), "context": data})
        return
    for name, value in data.items():
        shown = _when(value) if name in ("created", "used") else value
        say(f"{name + ':':<13}{shown}")


def stats(db: options.Database = None, json: options.Json = False) -> None:
    """Count what a database holds, shares, and takes on the disk.

    Examples:
      alaya db stats
      alaya db stats --db contexts.db --json
    """
    with open_store(db, read_only=True) as store:
        found = store.stats()
    if json:
        report({"database": str(store.path), **dataclasses.asdict(found)})
    else:
        say("\n".join([str(store.path), *(f"  {line}" for line in str(found).splitlines())]))


def check(
    ids: Annotated[list[str] | None, _IDS] = None,
    db: options.Database = None,
    json: options.Json = False,
) -> None:
    """Read contexts in full and compare every byte with its checksum.

    Checks all contexts when none is named. The exit code is 1 when there is damage.

    Examples:
      alaya db check
      alaya db check 3f2a --db contexts.db
    """
    with open_store(db, read_only=True) as store:
        records = chosen(store.list(), ids, store.path) if ids else store.list()
        problems = {record.id: list(store.check(record.id)) for record in records}
        damaged = [id for id, found in problems.items() if found]
        whole = list(store.check_catalogue()) if not ids else []
        # A damaged index is built again, which its problem says; its context need not go.
        of_indexes = {
            record.id: sum(
                len(store.check_index(record.id, kind)) for kind in _indexes(store, record)
            )
            + (len(store.check_leaves(record.id)) if record.header is not None else 0)
            for record in records
        }
    lost = [id for id in damaged if len(problems[id]) > of_indexes[id]]
    if json:
        report(
            {
                "database": str(store.path),
                "contexts": problems,
                "damaged": damaged,
                "catalogue": whole,
            }
        )
    else:
        for id, found in problems.items():
            say(f"{id}  {'damaged' if found else 'intact'}")
            for problem in found:
                say(f"  {problem}")
        for problem in whole:
            say(problem)
        if not problems:
            note(f"There is no context in {store.path}.")
    if damaged or whole:
        if lost and not json:
            note(f"Remove what is damaged: alaya db rm {' '.join(lost)} --db {store.path}")
        raise typer.Exit(1)


def rm(
    ids: Annotated[list[str], _IDS], db: options.Database = None, json: options.Json = False
) -> None:
    """Remove contexts and give their space back.

    Examples:
      alaya db rm 3f2a91
      alaya db rm 3f2a 77c0 --db contexts.db
    """
    with open_store(db, read_only=False) as store:
        removed = []
        for record in chosen(store.list(), ids, store.path):
            with on_interrupt(f"Removed before that: {', '.join(removed) or 'nothing'}."):
                store.remove(record.id)
            removed.append(record.id)
            note(f"Removed {record.id}: {record.num_tokens:,} tokens, {nbytes(record.nbytes)}.")
    if json:
        report({"database": str(store.path), "removed": removed})


def pin(
    ids: Annotated[list[str], _IDS], db: options.Database = None, json: options.Json = False
) -> None:
    """Keep contexts from being removed.

    Examples:
      alaya db pin 3f2a91
    """
    _set_pinned(ids, db, json, pinned=True)


def unpin(
    ids: Annotated[list[str], _IDS], db: options.Database = None, json: options.Json = False
) -> None:
    """Let pinned contexts be removed again.

    Examples:
      alaya db unpin 3f2a91
    """
    _set_pinned(ids, db, json, pinned=False)


def gc(db: options.Database = None, json: options.Json = False) -> None:
    """Give the space of what nobody holds back to the file system.

    That is what removed contexts held, once nobody reads them, and what a killed process left.

    Examples:
      alaya db gc
    """
    with open_store(db, read_only=False) as store:
        found = store.gc()
    if json:
        report({"database": str(store.path), **dataclasses.asdict(found)})
        return
    given = max(0, found.bytes_before - found.bytes_after)
    say(f"{nbytes(given)} given back; {nbytes(found.bytes_after)} are in use.")
    if found.in_use:
        note(f"Of removed contexts {found.in_use} are still read; run it again later.")
    if not found.holes:
        note("This file system cannot free parts of a file: the next contexts take their place.")


def migrate(
    path: Annotated[Path | None, typer.Argument(metavar="[PATH]", help="Or --db.")] = None,
    db: options.Database = None,
    json: options.Json = False,
) -> None:
    """Bring over a database that an earlier version wrote.

    Contexts and their graphs are written anew, and each context is read back before the old files
    go. If it is interrupted, or killed, give the same command again. It needs as much free space as
    the contexts take.

    Examples:
      alaya db migrate
      alaya db migrate contexts.db
    """
    from alaya_jax.progress import progress_bar
    from alaya_jax.storage.migrate import migrate, old_contexts

    place = path or options.database_path(db)
    total = sum(old.record.nbytes for old in old_contexts(place))
    with (
        on_interrupt("Nothing is lost; give the same command again."),
        progress_bar("bringing contexts over", total, "bytes") as advance,
    ):
        done = migrate(place, advance)
    if json:
        report({"database": str(place), **dataclasses.asdict(done)})
    else:
        say(f"{len(done.contexts)} contexts and {done.indexes} graphs are over.")
        for id, problem in done.lost.items():
            note(f"{id}: {problem}")
        for id, problem in done.damaged.items():
            note(f"{place / 'contexts' / id} was kept: {problem}")
    if done.damaged:
        raise typer.Exit(1)


def index(
    id: Annotated[str, _ID],
    graph: Annotated[bool, typer.Option("--graph", help="Build a graph over its keys.")] = False,
    model: options.Model = options.MODEL,
    rope: options.Rope = None,
    db: options.Database = None,
    memory: options.Memory = None,
    host_memory: options.HostMemory = None,
    json: options.Json = False,
) -> None:
    """Build an index over the keys of a context, and keep it.

    The model runs over the context once more. Afterwards, attention through Graph() finds the keys
    it wants without looking at all of them.

    Examples:
      alaya db index 3f2a91 --graph
      alaya db index 3f2a91 --graph --model ~/models/Llama-3.2-1B --db contexts.db
    """
    from alaya_jax.cli.runtime import budget_for, load_model

    if not graph:
        raise typer.BadParameter("say which index to build; there is --graph", param_hint="--graph")
    with open_store(db, read_only=True) as store:
        (record,) = chosen(store.list(), [id], store.path)
    loaded = load_model(model, rope=options.rope(rope))
    from alaya_jax.db import DB
    from alaya_jax.index import Graph

    budget = budget_for(loaded, record.num_tokens, memory, host_memory, Graph())
    with DB(options.database_path(db), loaded, budget) as opened:
        if record.id not in {context.id for context in opened.contexts}:
            raise ContextError(
                f"context {record.id} was made by another model than {loaded.name}; give it with "
                "--model, and its --rope"
            )
        with on_interrupt("The context is as it was."):
            opened.build_index(record.id, Graph())
    with open_store(db, read_only=True) as store:
        built = store.indexes(record.id)["graph"]
    note(f"Indexed {record.id}: {record.num_tokens:,} tokens, graph of {nbytes(built.nbytes)}.")
    if json:
        report({"database": opened.path, "context": record.id, "bytes": built.nbytes})


for verb in (ls, show, stats, check, index, pin, unpin, rm, gc, migrate):
    commands.command(help=help_text(verb))(verb)


def describe(store: "PoolStore") -> dict[str, Any]:
    """What a database holds, as plain data."""
    from alaya_jax.storage import sampled

    rows = [_row(store, sampled.named(record)) for record in store.list()]
    return {
        "kind": "database",
        "path": str(store.path),
        "bytes": sum(row["bytes"] for row in rows),
        "contexts": rows,
    }


def _row(store: "PoolStore", record: "ContextRecord") -> dict[str, Any]:
    header = record.header
    return {
        "id": record.id,
        "title": header.title if header else "",
        "tokens": record.num_tokens,
        "bytes": record.nbytes,
        "origin": [
            {"from": first, "plan": plan} for first, plan in (header.origin if header else ())
        ],
        "created": record.created,
        "used": record.used,
        "pinned": record.pinned,
        "model": header.fingerprint if header else None,
        "dtype": header.dtype if header else None,
        "store_dtype": (header.store_dtype or header.dtype) if header else None,
        "page_size": header.page_size if header else None,
        "namespace": header.namespace if header else None,
        "indexes": _indexes(store, record),
        "problem": record.problem,
    }


def _indexes(store: "PoolStore", record: "ContextRecord") -> dict[str, int]:
    if record.header is None:
        return {}
    return {kind: found.nbytes for kind, found in store.indexes(record.id).items()}


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _set_pinned(ids: list[str], db: Path | None, json: bool, *, pinned: bool) -> None:
    with open_store(db, read_only=False) as store:
        records = chosen(store.list(), ids, store.path)
        for record in records:
            store.pin(record.id, pinned)
    done = [record.id for record in records]
    if json:
        report({"database": str(store.path), "pinned" if pinned else "unpinned": done})
    else:
        note(f"{'Pinned' if pinned else 'Unpinned'}: {', '.join(done)}.")


def table(data: dict[str, Any]) -> str:
    """`describe` for people."""
    rows = data["contexts"]
    count = "1 context" if len(rows) == 1 else f"{len(rows)} contexts"
    lines = [f"{data['path']}: {count}, {nbytes(data['bytes'])}"]
    for row in rows:
        when = _when(row["created"])
        lines.append(
            f"  {row['id']}  {row['tokens']:>9,} tokens  {nbytes(row['bytes']):>9}  {when}"
        )
        namespace = f"namespace {row['namespace']}" if row["namespace"] else ""
        facts = ", ".join(filter(None, [row["title"], _model(row["model"]), namespace]))
        if facts or row["pinned"]:
            lines.append(f"    {facts}{' (pinned)' if row['pinned'] else ''}")
        for run in row["origin"]:
            plan = textwrap.shorten(run["plan"], 40)
            lines.append(f"    not exact: from token {run['from']:,} on by {plan}")
        lines += [f"    {kind} index, {nbytes(n)}" for kind, n in row["indexes"].items()]
        if row["problem"]:
            lines.append(f"    {row['problem']}")
    return "\n".join(lines)


def _model(fingerprint: str | None) -> str:
    """Which model, its digest shortened; how it was quantized or stretched stands behind that."""
    short = re.sub(r"([0-9a-f]{9})[0-9a-f]{4,}", r"\1", fingerprint or "")
    return short and f"model {short}"


def open_store(db: Path | None, *, read_only: bool, make: bool = False) -> "PoolStore":
    """The database that a --db option names.

    Args:
      db: the option.
      read_only: nothing will be changed.
      make: it need not be there yet.

    Raises:
      DatabaseError: it is not there, or cannot be used.
    """
    from alaya_jax.errors import DatabaseError
    from alaya_jax.storage import PoolStore

    path = options.database_path(db)
    if not make and not (path / "alaya_db.json").exists():
        hint = (
            "`alaya ask` makes it when it reads the first document" if db is None else "check --db"
        )
        raise DatabaseError(f"there is no database at {path}; {hint}")
    return PoolStore(path, read_only=read_only)


def chosen[C: Any](contexts: Sequence[C], ids: Sequence[str], where: Any) -> list[C]:
    """The contexts meant by ids or their beginnings, each once; all or none.

    Args:
      contexts: what there is, each with an `id`.
      ids: the argument.
      where: they are, for the error.

    Raises:
      ContextError: there is none such, or more than one.
    """
    found = {}
    for id in ids:
        matches = [context for context in contexts if context.id.startswith(id)]
        if len(matches) != 1:
            there = ", ".join(c.id for c in matches or contexts) or "none"
            many = "several contexts begin so" if matches else "no context has this id"
            raise ContextError(f"{id!r}: {many} in {where}; there are: {there}")
        found[matches[0].id] = matches[0]
    return list(found.values())
