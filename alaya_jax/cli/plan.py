"""`alaya plan`: how attention would be answered on this machine, before a model is loaded."""

from typing import Annotated

import typer

from alaya_jax.cli import options
from alaya_jax.cli.terminal import note, report, show


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model, as --model takes it.")
    ] = options.MODEL,
    length: options.Length = "32k",
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences served at once.")] = 1,
    recovery: options.Recovery = 0.95,
    tpot: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Time for a token, at most; refused if out of reach."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Device memory for keys, values and indexes, such as 8GiB.",
            show_default="what the device has beside the weights",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="float32, bfloat16 or float16.",
            show_default="as stored; quantized: float32 on a CPU, else bfloat16",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Show the plan that attention=auto takes, with predicted time and memory; no weights are read.

    The first run on a machine measures it for the model's shape of layer, some seconds. How many
    keys the model needs comes from `alaya calibrate`, if that has been run on the model.

    Examples:
      alaya plan smollm2-135m --length 8k
      alaya plan ~/models/Llama-3.1-8B-Instruct --length 128k --tpot 0.24 --memory 8GiB
      alaya plan ~/models/Llama-3.2-1B-Instruct --recovery 0.9 --batch 4 --json
    """
    tokens = options.length(length)
    from pathlib import Path

    from alaya_jax import checkpoint
    from alaya_jax.cli import runtime
    from alaya_jax.query.auto import Auto

    asked = Auto(tpot=tpot, recovery=recovery, device_memory=memory)
    data = checkpoint.inspect(model)
    if dtype is not None and dtype not in data["bytes"]["weights"]:
        allowed = ", ".join(data["bytes"]["weights"])
        raise typer.BadParameter(f"{dtype!r}; use {allowed}", param_hint="--dtype")
    runtime.start_jax()

    from alaya_jax.model import served_as
    from alaya_jax.models.config import LlamaConfig, RopeConfig
    from alaya_jax.query.situation import choose_before, default_dtype

    fields = {**data["config"], "rope": RopeConfig(**data["config"]["rope"])}
    config = LlamaConfig(**fields)
    place = Path(data["path"])
    choice = choose_before(
        asked,
        config,
        dtype or default_dtype(data["parameters_by_stored_type"]),
        tokens,
        batch=batch,
        parameters=data["parameters"],
        fingerprint=served_as(data["fingerprint"], config),
        directory=place if place.is_dir() else None,
    )
    if tokens > config.max_length:
        note(f"{model} declares at most {config.max_length:,} tokens.")
    if json:
        report({"model": model, **choice.to_dict()})
    else:
        show(choice.table())
