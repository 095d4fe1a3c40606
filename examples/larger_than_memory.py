"""Asks about a document whose keys and values do not fit into the memory that is given for them.

    python examples/larger_than_memory.py tests/data/declaration.txt "Name one complaint."
    python examples/larger_than_memory.py FILE QUESTION --model PATH --budget 64MiB --beta 50

The document is read once, in a database that has room for all of it; that takes memory, and may be
done on another machine (`alaya db push`, `alaya db export`). Then the database is opened again with
a small budget. The stored pages are read where they lie, in files that the operating system maps:
memory is needed for what is new, and for as much of the files as the system cares to keep.
"""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

import alaya_jax as aj
from alaya_jax.units import nbytes


def ask(
    document: Annotated[Path, typer.Argument(help="A text file.")],
    question: Annotated[str, typer.Argument(help="What is asked about it.")],
    model: Annotated[str, typer.Option(help="Name or path.")] = "smollm2-135m",
    budget: Annotated[str, typer.Option(help="For pages, when it is asked.")] = "16MiB",
    beta: Annotated[float, typer.Option(help="Of the range of keys that is read; 0: all.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Of the answer.")] = 40,
    db: Annotated[Path | None, typer.Option(help="Directory; a temporary one if none.")] = None,
) -> None:
    """Stores a document, and asks about it in a pool that could not hold it."""
    text = document.read_text(encoding="utf-8")
    loaded = aj.load(model)
    with tempfile.TemporaryDirectory() as folder:
        path = db or Path(folder) / "db"
        with aj.DB(path, loaded) as roomy:
            context = roomy.import_context(document=text)
            print(f"{context.num_tokens:,} tokens: {nbytes(context.nbytes)} of keys and values")
        with aj.DB(path, loaded, aj.Budget(device=budget)) as small:
            room = small.pool.capacity_tokens
            print(f"a budget of {budget} holds {room:,} tokens")
            asked = [{"role": "user", "content": question}]
            session, rest = small.create_session(messages=asked, document=text)
            plan = aj.DIPR(beta=beta) if beta else aj.Full()
            with session:
                run = aj.generate(session, rest, max_new_tokens=max_new_tokens, attention=plan)
                for token in run:
                    print(token.text, end="", flush=True)
                print()
                print(session.explain().heading)


if __name__ == "__main__":
    typer.run(ask)
