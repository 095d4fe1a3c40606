"""`alaya verify`: whether two checkpoints are the same model."""

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from alaya_jax.cli import options, runtime
from alaya_jax.cli.terminal import on_interrupt, report, say

if TYPE_CHECKING:
    from alaya_jax.checkpoint.peer import PeerVerification
    from alaya_jax.checkpoint.verification import Verification

_WHAT = "As SRC of alaya convert: any format."


class Peer(enum.StrEnum):
    """Programs whose logits can be compared with ours."""

    TRANSFORMERS = "transformers"


def verify(
    a: Annotated[str, typer.Argument(metavar="A", help=_WHAT)],
    b: Annotated[
        str | None,
        typer.Argument(metavar="[B]", help="The same. Not needed with --quantize and --against."),
    ] = None,
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="Compare what both predict, too.")
    ] = True,
    quantize: options.Quantize = None,
    against: Annotated[
        Peer | None,
        typer.Option(help="Compare the logits of A, a Hugging Face directory, with this program."),
    ] = None,
    peer_python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A Python that has torch and transformers, for --against.",
            show_default="the one that runs alaya",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Compare two checkpoints of any formats: is B the model A?

    The configs are compared field by field, the tokenizers by what they do, every tensor bit by
    bit; tensors of another type must be exactly the rounded ones. Then both models predict a fixed
    text, in float32, and the differences are shown. It takes memory for about two layers.

    --quantize keeps the weights of B in 8 or 4 bits while its logits are computed; without B, those
    of A. The KL says what that costs. It does not change the exit code.

    --against transformers has that program compute the same logits, in a process of its own, which
    needs memory for the whole model in float32; the KL must stay below 1e-4 nats everywhere.

    The exit code is 0 when B is A, exactly or rounded to another type, and 1 when it is not.

    Examples:
      alaya verify ~/models/Llama-3.1-8B llama.orbax
      alaya verify llama-hf --against transformers --peer-python ~/env/bin/python
      alaya verify ~/models/Llama-3.1-8B --quantize int4
    """
    from alaya_jax import checkpoint

    if b is None and quantize is None and against is None:
        hint = "name what to compare A with, or give --quantize or --against"
        raise typer.BadParameter(hint, param_hint="B")
    if against is not None and (b is not None or quantize is not None or not logits):
        raise typer.BadParameter("compares A alone, by its logits", param_hint="--against")
    if peer_python is not None and against is None:
        raise typer.BadParameter("is for --against", param_hint="--peer-python")
    runtime.start_jax()
    found: PeerVerification | Verification
    with on_interrupt("Nothing was changed."):
        if against is not None:
            found = checkpoint.verify_against(a, against.value, python=peer_python)
        else:
            found = checkpoint.verify(a, b or a, logits=logits, quantize=options.value(quantize))
    if json:
        report(found.to_dict())
    else:
        say(str(found))
    if not found.same:
        raise typer.Exit(1)
