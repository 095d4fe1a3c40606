"""`alaya verify`: whether two checkpoints are the same model."""

from typing import Annotated

import typer

from alaya_jax.cli import options, runtime
from alaya_jax.cli.terminal import on_interrupt, report

_WHAT = "As SRC of alaya convert: any format."


def verify(
    a: Annotated[str, typer.Argument(metavar="A", help=_WHAT)],
    b: Annotated[
        str | None,
        typer.Argument(metavar="[B]", help="The same; needed unless --quantize is given."),
    ] = None,
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="Compare what both predict, too.")
    ] = True,
    quantize: options.Quantize = None,
    json: options.Json = False,
) -> None:
    """Compare two checkpoints of any formats: is B the model A?

    The configs are compared field by field, the tokenizers by what they do, every tensor bit by
    bit; tensors of another type must be exactly the rounded ones. Then both models predict a fixed
    text, in float32, and the differences are shown. It takes memory for about two layers.

    --quantize keeps the weights of B in 8 or 4 bits while its logits are computed; without B, those
    of A. The KL says what that costs. It does not change the exit code.

    The exit code is 0 when B is A, exactly or rounded to another type, and 1 when it is not.

    Examples:
      alaya verify ~/models/Llama-3.1-8B llama.orbax
      alaya verify smollm2-135m smollm2 --json
      alaya verify ~/models/Llama-3.1-8B --quantize int4
    """
    from alaya_jax import checkpoint

    if b is None and quantize is None:
        raise typer.BadParameter("name what to compare A with, or --quantize", param_hint="B")
    runtime.start_jax()
    with on_interrupt("Nothing was changed."):
        found = checkpoint.verify(a, b or a, logits=logits, quantize=options.scheme(quantize))
    if json:
        report(found.to_dict())
    else:
        typer.echo(str(found))
    if not found.same:
        raise typer.Exit(1)
