"""`alaya eval`: do policies keep the answers of full attention, and what do they read for that?"""

import enum
from pathlib import Path
from typing import Annotated

import typer

from alaya_jax.cli import options
from alaya_jax.cli.terminal import note, on_interrupt, report, show

POLICIES = (
    "full, streaming_llm, infllm, quest, retrieval_attention, alayadb (one beta), recovery, auto"
)


class SuiteName(enum.StrEnum):
    """How much is asked."""

    QUICK = "quick"
    FULL = "full"


def eval(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=options.MODEL_HELP)] = options.MODEL,
    suite: Annotated[
        SuiteName,
        typer.Option(
            help="quick: a few questions about texts of 2,400 and 3,900 tokens. full: RULER's "
            "tasks, pass keys, values by key and legal questions from 4,096 tokens to what the "
            "model takes; hours."
        ),
    ] = SuiteName.QUICK,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where answers and the report go.")
    ] = Path("alaya-eval"),
    keys: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Share of a text's keys that a head reads, outside the window."
        ),
    ] = 0.05,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"May be repeated: {POLICIES}.", show_default="all of them"
        ),
    ] = None,
    legal: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Licenses to ask legal questions about: the *.LICENSE files of the package "
            "licensedcode-data.",
            show_default="those of the package, where it is installed",
        ),
    ] = None,
    essay: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A long text to hide RULER's needles in.",
            show_default="the Constitution of the United States",
        ),
    ] = None,
    squad: Annotated[
        Path | None, typer.Option(metavar="FILE", help="SQuAD 2.0, for RULER's qa_1.")
    ] = None,
    hotpotqa: Annotated[
        Path | None, typer.Option(metavar="FILE", help="HotpotQA, for RULER's qa_2.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the texts.")] = 1,
    json: options.Json = False,
) -> None:
    """Compare attention policies on questions with known answers.

    Every question is asked of the model under full attention and under each policy. All but full
    and auto read about equally many keys: the window of first and last tokens, and --keys of the
    rest. Questions that full attention itself fails say nothing of a policy: they are counted, and
    left out of the comparison.

    Each answer is on disk before the next question. A run that was stopped, in whatever way, goes
    on when the same command is given again. DIR then holds report.html, to be opened in a browser,
    summary.json, and answers.jsonl with a line for each answer.

    Examples:
      alaya eval
      alaya eval ~/models/Llama-3.2-1B --suite full --out llama-eval
      alaya eval --policy quest --policy recovery --keys 0.1 --out ten-percent
    """
    from alaya_jax.cli import runtime
    from alaya_jax.cli.ask import read_document

    for path, name in ((legal, "--legal"), (essay, "--essay")):
        if path is not None and not path.exists():
            raise typer.BadParameter(f"{path} is not there", param_hint=name)
    for path, name in ((squad, "--squad"), (hotpotqa, "--hotpotqa")):
        if path is not None and not path.is_file():
            raise typer.BadParameter(f"{path} is not a file", param_hint=name)
    text = Path(__file__).parent / "data" / "constitution.txt"
    haystack = read_document(essay or text)
    runtime.start_jax()

    from alaya_jax.evaluation import report as reports
    from alaya_jax.evaluation.run import Run
    from alaya_jax.evaluation.suite import SUITES, Source
    from alaya_jax.evaluation.tasks import legal as legal_tasks

    reports.require_plots()
    found = legal or legal_tasks.installed()
    if found is None:
        note("No legal questions: pip install licensedcode-data, or give --legal DIR.")
    source = Source(found, haystack, squad, hotpotqa)
    loaded = runtime.load_model(model)
    names = {"names": tuple(policy)} if policy else {}
    run = Run(loaded, SUITES[suite.value], source, keys=keys, seed=seed, **names)
    with on_interrupt(f"Give the same command again to go on; {out} has what was answered."):
        answers, summary = run.into(out)
    page = reports.page(summary, answers.rows.values(), answers.settings)
    (out / "report.html").write_text(page, "utf-8")
    if json:
        report({"out": str(out), "report": str(out / "report.html"), **summary.to_dict()})
    else:
        show(summary.table())
        note(f"Wrote {out / 'report.html'}.")
