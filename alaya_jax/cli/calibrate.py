"""`alaya calibrate`: how many keys the heads of a model need, measured on the user's texts."""

from pathlib import Path
from typing import Annotated

import typer

from alaya_jax.cli import options
from alaya_jax.cli.ask import read_document
from alaya_jax.cli.terminal import note, on_interrupt, report, show


def calibrate(
    texts: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE...", help="Texts like those to be read; UTF-8, long ones."),
    ] = None,
    model: options.Model = options.MODEL,
    length: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Length of the pieces that the texts are cut into.",
            show_default="the longest text, at most 4k",
        ),
    ] = None,
    rope: options.Rope = None,
    queries: Annotated[
        int, typer.Option(metavar="N", min=1, help="Query tokens sampled at each length.")
    ] = 32,
    machine: Annotated[
        bool,
        typer.Option(
            "--machine", help="Measure this machine again for the model's shape; no FILE is needed."
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Measure how many keys the heads of a model need.

    Of sampled query tokens: the fewest keys that hold 90, 95 and 99% of the attention, for each
    layer and head. attention=auto predicts from the result, which is a file beside the model, or in
    the cache directory for a model that is a single file.

    Examples:
      alaya calibrate contract.txt
      alaya calibrate --model ~/models/Llama-3.2-1B --length 8k reports/*.txt
      alaya calibrate --json contract.txt
      alaya calibrate --machine --model llama-3.1-8b
    """
    if machine:
        _measure_machine(model, json=json)
        if not texts:
            return
    if not texts:
        raise typer.BadParameter("name a text, or use --machine", param_hint="FILE")
    for path in texts:
        if not path.is_file():
            raise typer.BadParameter(f"{path} is not a file", param_hint="FILE")
    documents = [read_document(path) for path in texts]
    tokens = None if length is None else options.length(length)

    from alaya_jax.cli import runtime
    from alaya_jax.optimizer import calibration
    from alaya_jax.optimizer.calibrate import calibrate as measure

    loaded = runtime.load_model(model, rope=options.rope(rope))
    with on_interrupt("Nothing was kept."):
        found = measure(loaded, documents, length=tokens, queries=queries, save=False)
    place = calibration.keep(found, loaded.directory)
    if json:
        report({"path": str(place), **found.to_dict()})
    else:
        show(found.table())
        note(f"Kept in {place}.")


def _measure_machine(model: str, *, json: bool) -> None:
    """What attention=auto takes this machine for, measured anew."""
    from alaya_jax.cli import runtime
    from alaya_jax.cli.plan import described

    runtime.start_jax()
    from alaya_jax.optimizer.choice import was_busy
    from alaya_jax.optimizer.machine import machine_for

    config, kind, _ = described(model)
    found = machine_for(config, kind, again=True, progress=True)
    if json:
        report({"machine": found.to_dict()})
    else:
        note(f"Measured {found.device} for layers of {model} in {kind}.")
    if words := was_busy(found):
        note(f"{words[0].upper()}{words[1:]}.")
