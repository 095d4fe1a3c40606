"""`alaya convert`: the same model in another format."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from alaya_jax.cli import options, runtime
from alaya_jax.cli.terminal import note, on_interrupt, report, say
from alaya_jax.units import nbytes


class Format(enum.StrEnum):
    """What can be written."""

    HF = "hf"
    ORBAX = "orbax"
    GGUF_F16 = "gguf-f16"
    GGUF_BF16 = "gguf-bf16"
    GGUF_F32 = "gguf-f32"


class Dtype(enum.StrEnum):
    """Types of weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A directory of Hugging Face, Orbax or Meta, a .gguf file, or a bundled name.",
        ),
    ],
    path: Annotated[
        Path, typer.Argument(metavar="DST", help="A directory, or .gguf file, not there yet.")
    ],
    to: Annotated[
        Format,
        typer.Option(
            help="hf: safetensors that transformers and others load. orbax: restored straight onto "
            "any mesh. gguf-*: one file for llama.cpp, matrices in that type.",
        ),
    ] = Format.HF,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Type to write.", show_default="as stored; float32 if quantized"),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes of weights in a safetensors file.")
    ] = "5GB",
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXES",
            help="For orbax: store each tensor in the parts that the devices of such a mesh hold "
            "(tensor=8: eight), so that each of them, or its host, later reads its own part alone. "
            "Needs no devices now, and any other mesh can restore it too.",
        ),
    ] = None,
    gguf_pre: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="For gguf: llama.cpp's name of how the tokenizer cuts text, such as llama-bpe.",
            show_default="found by comparing it with known ones",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a conversion that was cut off.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Then compare the result with SRC, as alaya verify.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Write a model in another format or type, tensor by tensor.

    The memory it takes depends on the largest tensor, not on the model. DST appears when everything
    is written, read back and on the disk; until then the work is in a hidden directory beside it,
    which --resume continues after a kill or a full disk. SRC is only read. Config, tokenizer and
    chat template go along.

    Examples:
      alaya convert ~/models/Llama-3.1-8B llama.orbax --to orbax --mesh tensor=8
      alaya convert smollm2-135m smollm2 --dtype bfloat16 --verify
      alaya convert ~/llama3/original llama3-hf --resume
    """
    from alaya_jax import checkpoint

    devices = None if mesh is None else runtime.cpu_mesh(mesh)
    runtime.start_jax()
    with on_interrupt("What is done is kept; continue with --resume."):
        done = checkpoint.convert(
            source,
            path,
            to=to.value,
            dtype=dtype and dtype.value,
            shard_size=shard_size,
            mesh=devices,
            gguf_pre=gguf_pre,
            resume=resume,
        )
    for name, count in done.nonfinite.items():
        note(f"warning: {name} has {count:,} values that are infinite or not a number")
    found = None
    if verify:
        with on_interrupt(f"{path} is complete, but was not compared: alaya verify SRC DST."):
            found = checkpoint.verify(source, path)
    if json:
        data = done.to_dict()
        report(data if found is None else data | {"verification": found.to_dict()})
    else:
        say(
            f"{path}: {done.tensors} tensors, {nbytes(done.nbytes)} in {done.dtype} as {done.to}, "
            f"{done.seconds:.1f} s ({nbytes(done.nbytes / done.seconds)}/s)"
        )
        if found is not None:
            say(str(found))
    if found is not None and not found.same:
        raise typer.Exit(1)
