"""Options that several verbs share, and what their texts mean."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alaya_jax.errors import AlayaError

if TYPE_CHECKING:
    from alaya_jax.models.quantized import Scheme
    from alaya_jax.query import Query
    from alaya_jax.sampling import Sampling

MODEL = "smollm2-135m"

_ATTENTION = "full, window[:SINK,RECENT], dipr:BETA or topk:K"

Attention = Annotated[
    str,
    typer.Option(
        metavar="POLICY",
        help=f"Which keys a new token attends to: {_ATTENTION}. full reads every key; dipr:50 "
        "those whose product with the query is within 50 of the best; topk:100 the 100 best; the "
        "first and last tokens (the window) are always read.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        help="A directory (Hugging Face, Orbax, or Meta's own), a .gguf file, or a bundled name.",
    ),
]
Database = Annotated[
    Path | None,
    typer.Option(
        "--db", metavar="PATH", help="The database directory.", show_default="asked.db in the cache"
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for keys and values, such as 8GiB.",
        show_default="what the prompt needs",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Stop after so many tokens.")]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="T", min=0.0, help="0 takes the most likely token; higher is more varied."
    ),
]
TopK = Annotated[
    int, typer.Option(metavar="K", min=0, help="Draw from the K most likely tokens; 0: all.")
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="P", min=0.0, max=1.0, help="Draw from the fewest tokens of probability P."
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        metavar="P",
        min=0.0,
        max=1.0,
        help="Draw from tokens at least P times as likely as the best.",
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(metavar="R", help="Above 1: tokens that have occurred become less likely.")
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Equal seeds give equal texts.")]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")
]


class Quantization(enum.StrEnum):
    """What weights can be quantized to."""

    INT8 = "int8"
    INT4 = "int4"


Quantize = Annotated[
    Quantization | None,
    typer.Option(
        help="Keep the weights in 8 or 4 bits, for a host that has no room for more. It is slower "
        "on a CPU, and another model, with contexts of its own; alaya verify MODEL --quantize int4 "
        "shows how far off.",
        show_default="as stored",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, not text.")]


def scheme(quantize: Quantization | None) -> "Scheme | None":
    """The scheme that a --quantize option means."""
    return None if quantize is None else quantize.value


def attention(text: str) -> "Query":
    """The query that an --attention option means.

    Raises:
        typer.BadParameter: It is not understood.
    """
    from alaya_jax import query

    kind, _, rest = text.strip().partition(":")
    try:
        numbers = [float(part) for part in rest.split(",")] if rest else []
        match kind, numbers:
            case "full", []:
                return query.Full()
            case "window", []:
                return query.Window()
            case "window", [sink, recent]:
                return query.Window(_whole(sink), _whole(recent))
            case "dipr", [beta]:
                return query.DIPR(beta=beta)
            case "topk", [k]:
                return query.TopK(_whole(k))
            case _:
                raise ValueError("not one of them")
    except (ValueError, AlayaError) as error:
        raise typer.BadParameter(
            f"{text!r} is no attention policy; use {_ATTENTION}, such as dipr:50 ({error})",
            param_hint="--attention",
        ) from error


def sampling(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    stop: list[str] | None,
) -> "Sampling":
    """The sampling that the options mean.

    Raises:
        typer.BadParameter: A value is out of range.
    """
    from alaya_jax.sampling import Sampling

    if temperature == 0 and (top_k or top_p < 1 or min_p):
        raise typer.BadParameter(
            "--top-k, --top-p and --min-p choose among random draws, and temperature 0 draws none; "
            "set --temperature 0.8, say, or leave them out"
        )
    try:
        return Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
        )
    except AlayaError as error:
        raise typer.BadParameter(str(error)) from error


def database_path(path: Path | None) -> Path:
    """The database of an option: the one named, or the one `alaya ask` keeps in the cache."""
    if path is not None:
        return path.expanduser()
    from alaya_jax.checkpoint import bundled

    return bundled.cache_directory() / "asked.db"


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError(f"{number} is no whole number")
    return int(number)
