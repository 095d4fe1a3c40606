"""`alaya explain`: which of a document's tokens a question's answer attends to."""

from pathlib import Path
from typing import Annotated

import typer

from alaya_jax.cli import options
from alaya_jax.cli.ask import read_document
from alaya_jax.cli.terminal import note, on_interrupt, report, show

FIGURES = "recovery, error, attended, keys_needed, beta, beta_needed or mass_estimated"


def explain(
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="In quotes.")],
    context: Annotated[
        Path,
        typer.Option(metavar="FILE", help="The document: a text file in UTF-8; - reads stdin."),
    ],
    model: options.Model = options.MODEL,
    rope: options.Rope = None,
    attention: options.Attention = "recovery:0.95",
    db: options.Database = None,
    max_new_tokens: options.MaxNewTokens = 16,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw a heat map, layer by head, into this file (also .svg, .pdf).",
        ),
    ] = None,
    what: Annotated[
        str, typer.Option(metavar="FIGURE", help=f"What to draw: {FIGURES}.")
    ] = "recovery",
    date: options.Day = None,
    memory: options.Memory = None,
    host_memory: options.HostMemory = None,
    json: options.Json = False,
) -> None:
    """Show what an answer reads of a document, and how good that is.

    A few tokens of the answer are generated as `alaya ask` would. Then the last one's attention is
    run again, each layer timed, and held against full attention: the keys attended to, the share of
    the attention they really hold, the error of the output, the range (beta) that would have been
    needed.

    Examples:
      alaya explain --context contract.txt "What is the notice period?"
      alaya explain --context contract.txt --attention dipr:50 --json "Who signs?"
      alaya explain --context contract.txt --attention auto --plot map.png "Who?"

    The table goes to stdout; the answer so far to stderr. With --json the object also lists the
    positions that each head retrieved.
    """
    if str(context) != "-" and not context.is_file():
        raise typer.BadParameter(f"{context} is not a file", param_hint="--context")
    policy = options.attention(attention)
    document = read_document(context)
    path = options.database_path(db)

    from alaya_jax import prompts
    from alaya_jax.cli import runtime
    from alaya_jax.explain.explanation import HEAT_MAPS
    from alaya_jax.generation import generate

    if what not in HEAT_MAPS:
        raise typer.BadParameter(f"{what!r} is no figure; use {FIGURES}", param_hint="--what")
    loaded = runtime.load_model(model, rope=options.rope(rope))
    asked = [{"role": "user", "content": question}]
    now = prompts.prompt(prompts.tokenizer_of(loaded), asked, document, date)
    room, indexes = len(now.ids) + max_new_tokens, runtime.indexes_of(policy, memory)
    budget = runtime.budget_for(loaded, room, memory, host_memory, indexes)
    database, start = runtime.open_for_document(path, loaded, budget, document, date)
    with database:
        with on_interrupt("The document was not stored, and nothing half-written is left."):
            title = "stdin" if str(context) == "-" else context.name
            runtime.import_document(database, start, title=title)
        session, rest = database.create_session(messages=asked, document=document, date=date)
        with session:
            run = generate(
                session, rest, max_new_tokens=max_new_tokens, attention=policy, progress=True
            )
            for _ in run:
                pass
            found = session.explain(analyze=True)
    if plot is not None:
        found.plot(what).savefig(plot)
        note(f"Drew {what} into {plot}.")
    if json:
        data = {"question": question, "answer": run.text, "model": loaded.name}
        report({**data, **found.to_dict()})
    else:
        note(f"answer so far: {run.text}")
        show(found)
