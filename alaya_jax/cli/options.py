"""Options that several verbs share, and what their texts mean."""

import enum
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alaya_jax import words
from alaya_jax.cli.terminal import load_jax
from alaya_jax.errors import AlayaError

if TYPE_CHECKING:
    from alaya_jax.query.plan import Attention as Asked
    from alaya_jax.rope import Rope as Stretched
    from alaya_jax.runtime.sampling.params import Sampling

MODEL = "smollm2-135m"

Attention = Annotated[
    str,
    typer.Option(
        metavar="POLICY",
        help=f"Which keys a new token attends to: {words.ATTENTION}. full reads every key; "
        "topk:100 the 100 best for the token; dipr:50 those whose product with the query is within "
        "50 of the best; recovery:0.95 the fewest that hold 95% of the attention; error:0.02 the "
        "fewest that keep the output's error below 2% by estimate, the others being estimated; "
        "the first and last tokens (the window) are always read. auto:0.95 takes, layer by "
        "layer, the fastest way to hold 95% on this machine. What finds the keys may follow, "
        f"as in dipr:50@sketch: {words.INDEXES} (codes of 4, 1, 2 or 8 bits a channel, or of 2 "
        "or 1 in a basis that alaya calibrate learnt; summaries of pages, and a graph that "
        "alaya db index --graph built, for topk and dipr); else it is chosen by length.",
    ),
]
MODEL_HELP = "A directory (Hugging Face, Orbax, or Meta's own), a .gguf file, or a bundled name."
Model = Annotated[str, typer.Option(metavar="MODEL", help=MODEL_HELP)]
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
HostMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for stored pages that --memory has no room for, which are read in the "
        "database's files.",
        show_default="what the system keeps",
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
    """What weights can be kept in."""

    INT8 = "int8"
    INT4 = "int4"
    STORED = "stored"


Quantize = Annotated[
    Quantization | None,
    typer.Option(
        help="Keep the weights in 8 or 4 bits: less memory, and faster tokens on a CPU. stored: as "
        "a quantized GGUF file has them. It is another model, with contexts of its own; alaya "
        "verify MODEL --quantize int4 shows how far off.",
        show_default="dense",
    ),
]
_ROPES = "linear, dynamic, yarn or llama3, then :FACTOR[,ORIGINAL]"

Rope = Annotated[
    str | None,
    typer.Option(
        metavar="KIND:FACTOR",
        help=f"Stretch RoPE for a context longer than the model declares: {_ROPES}, such as "
        "yarn:4, or yarn:4,8k where the checkpoint does not say the length that it was trained "
        "for. It is another model, with contexts of its own, and answers somewhat worse.",
        show_default="as the checkpoint has it",
    ),
]
Day = Annotated[
    datetime | None,
    typer.Option(
        metavar="YYYY-MM-DD",
        formats=["%Y-%m-%d"],
        help="The date that the model's chat template prints, if it prints one.",
        show_default="that of the stored document, or today",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, not text.")]


Recovery = Annotated[
    float,
    typer.Option(metavar="SHARE", min=0.0, max=1.0, help="Share of the attention to keep."),
]


class Storage(enum.StrEnum):
    """What keys and values can be stored in."""

    INT8 = "int8"
    FP8 = "fp8"


StoreDtype = Annotated[
    Storage | None,
    typer.Option(
        help="Store keys and values in 8 bits: a half or a quarter of the bytes, close to exact "
        "and never taken for it. Later questions have to say so too.",
        show_default="as computed",
    ),
]


def value(chosen: enum.StrEnum | None) -> Any:
    """What an option of a few words means: the word."""
    return None if chosen is None else chosen.value


def rope(text: str | None) -> "Stretched | None":
    """What a --rope option means.

    Raises:
      typer.BadParameter: it is not understood.
    """
    if text is None:
        return None
    from alaya_jax.rope import Rope as Stretched

    kind, _, rest = text.strip().partition(":")
    factor, _, original = rest.partition(",")
    try:
        known: Any = kind
        return Stretched(known, float(factor), length(original) if original else None)
    except (ValueError, AlayaError, typer.BadParameter) as error:
        raise typer.BadParameter(
            f"{text!r}; use {_ROPES}, such as yarn:4 ({error})", param_hint="--rope"
        ) from error


def attention(text: str) -> "Asked":
    """What an --attention option means: a query, a plan where an index is named, or `Auto`.

    Raises:
      typer.BadParameter: it is not understood.
    """
    load_jax()
    try:
        return words.attention(text)
    except AlayaError as error:
        raise typer.BadParameter(str(error), param_hint="--attention") from error


def length(text: str) -> int:
    """Tokens, from "131072", "128k" (of 1,024) or "1M".

    Raises:
      typer.BadParameter: it is no such number.
    """
    digits, unit = text.rstrip("kKM"), text[len(text.rstrip("kKM")) :]
    factor = {"": 1, "k": 1024, "K": 1024, "M": 1024**2}.get(unit)
    if not digits.isdecimal() or factor is None or int(digits) == 0:
        raise typer.BadParameter(
            f"{text!r} is no number of tokens; use 32768, 128k or 1M", param_hint="--length"
        )
    return int(digits) * factor


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
      typer.BadParameter: a value is out of range.
    """
    from alaya_jax.runtime.sampling.params import Sampling

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
