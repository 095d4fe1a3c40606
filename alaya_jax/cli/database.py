"""`alaya db`: look after a database of contexts. Only `index` loads a model."""

import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alaya_jax.cli import options
from alaya_jax.cli.terminal import help_text, note, on_interrupt, report
from alaya_jax.errors import ContextError
from alaya_jax.units import nbytes

if TYPE_CHECKING:
    from alaya_jax.storage import DirectoryStore

commands = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, check, index and remove stored contexts.",
)

_ID = typer.Argument(metavar="ID", help="Its id, or a beginning that only one context has.")
_IDS = typer.Argument(metavar="ID...", help="Ids, or beginnings that only one context has.")


def ls(db: options.Database = None, json: options.Json = False) -> None:
    """List the contexts of a database: id, tokens, size, when stored, title.

    Examples:
      alaya db ls
      alaya db ls --db contexts.db --json
    """
    with open_store(db, read_only=True) as store:
        data = describe(store)
    if json:
        report(data)
    else:
        typer.echo(table(data))


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
        # A damaged index is built again, which its problem says; its context need not go.
        of_indexes = {
            id: sum(len(store.check_index(id, kind)) for kind in store.indexes(id))
            for id in damaged
        }
    lost = [id for id in damaged if len(problems[id]) > of_indexes[id]]
    if json:
        report({"database": str(store.path), "contexts": problems, "damaged": damaged})
    else:
        for id, found in problems.items():
            typer.echo(f"{id}  {'damaged' if found else 'intact'}")
            for problem in found:
                typer.echo(f"  {problem}")
        if not problems:
            note(f"There is no context in {store.path}.")
    if damaged:
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


def index(
    id: Annotated[str, _ID],
    graph: Annotated[bool, typer.Option("--graph", help="Build a graph over its keys.")] = False,
    model: options.Model = options.MODEL,
    rope: options.Rope = None,
    db: options.Database = None,
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Build an index over a context's keys and keep it with the context.

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

    with DB(
        options.database_path(db), loaded, budget_for(loaded, record.num_tokens, memory)
    ) as opened:
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


for verb in (ls, check, index, rm):
    commands.command(help=help_text(verb))(verb)


def describe(store: "DirectoryStore") -> dict[str, Any]:
    """What a database holds, as plain data."""
    from alaya_jax.storage import sampled

    rows = [
        {
            "id": record.id,
            "title": record.header.title if record.header else "",
            "tokens": record.num_tokens,
            "bytes": record.nbytes,
            "origin": [
                {"from": first, "plan": plan}
                for first, plan in (record.header.origin if record.header else ())
            ],
            "created": record.created,
            "model": record.header.fingerprint if record.header else None,
            "dtype": record.header.dtype if record.header else None,
            "namespace": record.header.namespace if record.header else None,
            "indexes": {kind: found.nbytes for kind, found in store.indexes(record.id).items()},
            "problem": record.problem,
        }
        for record in map(sampled.named, store.list())
    ]
    return {
        "kind": "database",
        "path": str(store.path),
        "bytes": sum(row["bytes"] for row in rows),
        "contexts": rows,
    }


def table(data: dict[str, Any]) -> str:
    """`describe` for people."""
    rows = data["contexts"]
    count = "1 context" if len(rows) == 1 else f"{len(rows)} contexts"
    lines = [f"{data['path']}: {count}, {nbytes(data['bytes'])}"]
    for row in rows:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
        model = f"model {row['model'][:12]}" if row["model"] else ""
        lines.append(
            f"  {row['id']}  {row['tokens']:>9,} tokens  {nbytes(row['bytes']):>9}  {when}  {model}"
            f"  {row['title']}".rstrip()
        )
        for run in row["origin"]:
            plan = textwrap.shorten(run["plan"], 50)
            lines.append(f"    not exact: from token {run['from']:,} on by {plan}")
        lines += [f"    {kind} index, {nbytes(n)}" for kind, n in row["indexes"].items()]
        if row["problem"]:
            lines.append(f"    {row['problem']}")
    return "\n".join(lines)


def open_store(db: Path | None, *, read_only: bool, make: bool = False) -> "DirectoryStore":
    """The database that a --db option names.

    Args:
      db: the option.
      read_only: nothing will be changed.
      make: it need not be there yet.

    Raises:
      DatabaseError: it is not there, or cannot be used.
    """
    from alaya_jax.errors import DatabaseError
    from alaya_jax.storage import DirectoryStore

    path = options.database_path(db)
    if not make and not (path / "alaya_db.json").exists():
        hint = (
            "`alaya ask` makes it when it reads the first document" if db is None else "check --db"
        )
        raise DatabaseError(f"there is no database at {path}; {hint}")
    return DirectoryStore(path, read_only=read_only)


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
