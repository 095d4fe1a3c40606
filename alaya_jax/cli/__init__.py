"""The `alaya` command: one module a verb. A verb imports jax when it runs, not before."""

import typer

from alaya_jax.cli import (
    ask,
    calibrate,
    convert,
    database,
    demo,
    eval,
    explain,
    fetch,
    generate,
    inspect,
    moving,
    plan,
    serve,
    verify,
)
from alaya_jax.cli.terminal import Commands, help_text, speak_plainly

__all__ = ["app", "main"]

app = typer.Typer(
    name="alaya",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain text: it starts faster, and pipes and screen readers can take it
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        from alaya_jax import __version__

        typer.echo(f"alaya_jax {__version__}")
        raise typer.Exit


def alaya(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Ask long documents many questions, and read each document once.

    alaya keeps a language model's work on a text (its keys and values) in a database on disk. The
    first question reads the text; all later ones start from what is stored, in any process.

    Begin with:
      alaya demo           a small Llama answers questions on this machine
      alaya ask --context contract.txt "Who signed it?"
      alaya ask --help     every command explains itself

    Answers and reports go to stdout, progress and notes to stderr. Exit codes: 0 done, 1 it could
    not be done (stderr says why, and the way out), 2 the command was not understood, 130
    interrupted. ALAYA_CACHE names the directory for models, contexts and compiled programs (default
    ~/.cache/alaya_jax); ALAYA_DEBUG=1 adds the stack trace to errors.
    """


app.callback(help=help_text(alaya))(alaya)
for verb in (
    demo.demo,
    ask.ask,
    generate.generate,
    serve.serve,
    explain.explain,
    plan.plan,
    eval.eval,
    calibrate.calibrate,
    inspect.inspect,
    fetch.fetch,
    convert.convert,
    verify.verify,
):
    app.command(help=help_text(verb))(verb)
for verb in (moving.push, moving.pull, moving.sync, moving.export):
    database.commands.command(help=help_text(verb))(verb)
database.commands.command("import", help=help_text(moving.import_))(moving.import_)
app.add_typer(database.commands, name="db")


def main() -> None:
    """Runs the command line of this process."""
    speak_plainly()
    app()
