"""Checkpoints: read in any format we know, as one config, one parameter pytree, one tokenizer.

checkpoint = read_checkpoint("path/to/Llama-3.1-8B", mesh=aj.make_mesh(tensor=8))
checkpoint = read_checkpoint("model-Q4_1.gguf")
checkpoint = read_checkpoint("smollm2-135m")           # after `alaya fetch smollm2-135m`
convert("path/to/Llama-3.1-8B", "llama.orbax", to="orbax")
save("tuned", checkpoint.config, params, checkpoint.tokenizer, to="hf")
print(verify("path/to/Llama-3.1-8B", "llama.orbax"))
"""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from alaya_jax.checkpoint import bundled, orbax
from alaya_jax.checkpoint.conversion import (
    SHARD_SIZE,
    Conversion,
    Target,
    params_source,
    write_checkpoint,
)
from alaya_jax.checkpoint.gguf import open_gguf
from alaya_jax.checkpoint.hf import open_hf
from alaya_jax.checkpoint.identity import identified
from alaya_jax.checkpoint.inspection import inspect_source
from alaya_jax.checkpoint.meta import is_meta, open_meta
from alaya_jax.checkpoint.params import Memory, load_params, match
from alaya_jax.checkpoint.source import Source, StoredTensor, absolute
from alaya_jax.errors import CheckpointError, ConfigError, RequestError
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.quantized import QUANTIZATION, Scheme, check_scheme
from alaya_jax.models.tokenizer import Tokenizer
from alaya_jax.pallas_kernels.dispatch import target_of
from alaya_jax.settings import under_own_settings
from alaya_jax.sharding import ShardingRules

if TYPE_CHECKING:
    from alaya_jax.checkpoint.peer import PeerVerification
    from alaya_jax.checkpoint.verification import Verification

__all__ = [
    "Checkpoint",
    "Conversion",
    "convert",
    "inspect",
    "load",
    "locate",
    "open_checkpoint",
    "read_checkpoint",
    "save",
    "verify",
    "verify_against",
]

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model as read from disk.

    Attributes:
      config: architecture.
      params: parameter pytree, as `alaya_jax.models.llama` takes it.
      tokenizer: None when the checkpoint has none.
      fingerprint: identity of the config and of every stored byte (see `identity.fingerprint`), of
        the quantization, and of the cast where the stored types differ.
      source: the directory or file that was read.
    """

    config: LlamaConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    fingerprint: str
    source: Path

    def __repr__(self) -> str:
        count = sum(x.size for x in jax.tree.leaves(self.params))
        return f"Checkpoint({self.source}, {count:,} parameters, {self.fingerprint[:12]})"


@under_own_settings
def read_checkpoint(
    path_or_name: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    dtype: Any = None,
    quantize: Scheme | None = None,
    memory: Memory = "device",
    progress: bool = True,
) -> Checkpoint:
    """Loads a model: a directory of HF, Orbax or Meta, a GGUF file, or a bundled model by name.

    Everything is checked before a weight is read: all problems of a checkpoint are in one error.

    Args:
      path_or_name: a directory with config.json and safetensors; a directory that `convert` or
        `save` wrote as Orbax; Meta's, with params.json and consolidated.*.pth; a .gguf file; or a
        bundled name.
      mesh: devices to lay the parameters on; None: the default device.
      rules: where each logical axis lies on the mesh; default `ShardingRules()`.
      dtype: type of all parameters: float32, bfloat16 or float16. None keeps what is stored, tensor
        by tensor, for HF; for GGUF it is the type of the matrices (their norms are always stored as
        float32), and quantized types become float32 on CPU and bfloat16 on other devices.
      quantize: "int8" or "int4" keeps matrices and the embedding in that form from the moment each
        is read; "stored" in the groups of 8 or 4 bits that a quantized GGUF file holds them in. See
        `models.quantized`. That is another model, with a fingerprint of its own.
      memory: "pinned_host" leaves the parameters in host memory that the devices can reach.
      progress: shows a progress bar on stderr when it is a terminal.

    Raises:
      CheckpointError: nothing is found under that name, or the files are damaged, incomplete or do
        not match their config.
      ConfigError: the config is not understood, or does not divide over the mesh.
      TokenizerError: there is a tokenizer, and it is damaged.
    """
    cast = None if dtype is None else _check_dtype(dtype)
    source = open_checkpoint(path_or_name)
    scheme = _scheme_for(quantize, source)
    pairs = match(source)
    tokenizer = source.read_tokenizer()
    if cast is None:
        cast = source.dtype
        platform = target_of(mesh).platform
        if source.quantized and platform != "cpu":
            cast = np.dtype(ml_dtypes.bfloat16)

    def dtype_of(tensor: StoredTensor) -> np.dtype:
        assert tensor.dtype is not None  # refused by match
        return tensor.dtype if cast is None else cast

    rules = rules or ShardingRules()
    if memory not in get_args(Memory):
        raise ConfigError(f"memory = {memory!r} is not known; use one of {get_args(Memory)}")
    tensors = [tensor for _, tensor in pairs]
    with identified(source, tensors, mesh) as fingerprint:
        if source.format == "orbax" and scheme is None:
            params = orbax.load_tree(
                source, mesh=mesh, rules=rules, dtype_of=dtype_of, memory=memory, progress=progress
            )
        else:
            params = load_params(
                pairs,
                source.format,
                mesh=mesh,
                rules=rules,
                dtype_of=dtype_of,
                quantize=scheme,
                memory=memory,
                progress=progress,
            )
        identity = fingerprint()
    if cast is not None and source.dtype is None and len({t.dtype for t in tensors}) > 1:
        identity += f"-{cast}"  # of one type now, which the type of the keys does not tell
    return Checkpoint(
        config=source.config,
        params=params,
        tokenizer=tokenizer,
        fingerprint=identity if scheme is None else f"{identity}-{scheme}{QUANTIZATION}",
        source=source.path,
    )


def _scheme_for(quantize: Any, source: Source) -> Scheme | None:
    """A scheme by name, where it suits what is loaded.

    Raises:
      ConfigError: it is not known, or wants what this checkpoint does not hold.
    """
    scheme = None if quantize is None else check_scheme(quantize)
    if scheme == "stored" and not source.quantized:
        raise ConfigError(
            f"quantize='stored' keeps the groups of a quantized GGUF file, and {source.path} holds "
            "none; quantize its weights now with 'int8' or 'int4', or leave quantize out"
        )
    return scheme


load = read_checkpoint
"""The same under the name that stands beside `save`."""


def inspect(path_or_name: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint is, as plain data: config, sizes, and where each parameter is stored.

    Its files are checked as for loading. No weights are loaded; their bytes are read for the
    fingerprint, unless it is known already.

    Args:
      path_or_name: as `read_checkpoint` takes it.

    Returns:
      path, format, fingerprint, parameters, config, bytes, and by the path of each parameter its
      name, shape and type in the file, its own shape and its logical axes.

    Raises:
      CheckpointError, ConfigError, TokenizerError: it cannot be loaded; all problems are named.
    """
    return inspect_source(open_checkpoint(path_or_name))


@under_own_settings
def convert(  # noqa: PLR0913 - its keywords are its settings
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    to: Target = "hf",
    dtype: Any = None,
    shard_size: int | str = SHARD_SIZE,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    gguf_pre: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Conversion:
    """Writes a checkpoint in another format or type, tensor by tensor, whole or not at all.

    Takes at most twice the memory of the largest tensor and 500 MiB (quantized GGUF: more). The
    source is only read. `path` appears when everything is written, read back and on the disk.

    Args:
      source: as `read_checkpoint` takes it.
      path: a directory, or a GGUF file, that does not exist yet.
      to: "hf" (safetensors, config, tokenizer: what transformers loads), "orbax", or "gguf-f16",
        "gguf-bf16", "gguf-f32" (one file; norms stay float32).
      dtype: float32, bfloat16 or float16; None keeps what is stored (float32 for quantized files).
        Not for GGUF, whose type is in its name.
      shard_size: most bytes of tensors in a safetensors file, such as "5GB".
      mesh: for Orbax: stores each tensor in the parts that the devices of this mesh will hold, so
        that each reads its own and nothing else. Any other mesh can restore it too. The devices
        hold one tensor at a time; virtual ones of the CPU will do.
      rules: where each logical axis lies on the mesh; default `ShardingRules()`.
      gguf_pre: for GGUF: the name of how the tokenizer cuts text (`tokenizer.ggml.pre`), where it
        cannot be found by comparing the tokenizer with those that are known.
      resume: continues a conversion that was cut off, and starts one where there is none. A GGUF
        file is always started over.
      progress: shows a progress bar on stderr when it is a terminal.

    Raises:
      CheckpointError: the source is damaged, `path` exists or cannot be written, the disk is full,
        or what is to be resumed was another conversion.
      ConfigError: a setting or the config is not understood.
      TokenizerError: there is a tokenizer, and it is damaged.
      RequestError: the program has several processes.
    """
    if jax.process_count() > 1:
        raise RequestError("convert runs in one process: run `alaya convert` on one host")
    return write_checkpoint(
        open_checkpoint(source),
        Path(path),
        to=to,
        dtype=None if dtype is None else _check_dtype(dtype),
        shard_size=shard_size,
        mesh=mesh,
        rules=rules or ShardingRules(),
        gguf_pre=gguf_pre,
        resume=resume,
        progress=progress,
    )


@under_own_settings
def save(
    path: str | os.PathLike[str],
    config: LlamaConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    *,
    to: Target = "orbax",
    dtype: Any = None,
    shard_size: int | str = SHARD_SIZE,
    progress: bool = True,
) -> Conversion:
    """Writes parameters in memory as a checkpoint; they may be sharded over a mesh.

    To Orbax it also works in a program of several processes: all call this, on a file system they
    share, and each writes what it holds.

    Args:
      path: a directory that does not exist yet; it appears when complete.
      config: their architecture.
      params: parameter pytree, as `alaya_jax.models.llama` takes it.
      tokenizer: goes beside the weights.
      to, dtype, shard_size, progress: as in `convert`.

    Raises:
      CheckpointError: `params` are not of this config, or `path` cannot be written.
      RequestError: the program has several processes, and `to` is not "orbax".
    """
    if jax.process_count() > 1 and to != "orbax":
        raise RequestError(
            f"several processes can write one Orbax checkpoint, not to={to!r}; save it as orbax, "
            "and convert that"
        )
    return write_checkpoint(
        params_source(config, params, tokenizer),
        Path(path),
        to=to,
        dtype=None if dtype is None else _check_dtype(dtype),
        shard_size=shard_size,
        mesh=None,
        rules=ShardingRules(),
        gguf_pre=None,
        resume=False,
        progress=progress,
    )


@under_own_settings
def verify(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    logits: bool = True,
    quantize: Scheme | None = None,
    progress: bool = True,
) -> "Verification":
    """Compares two checkpoints of any formats: configs, tokenizers, every tensor, and logits.

    Reads both tensor by tensor; takes memory for about two layers in float32.

    Args:
      a, b: as `read_checkpoint` takes them.
      logits: also computes what both predict for a fixed prompt, in float32.
      quantize: quantizes the weights of b before its logits are computed, as `read_checkpoint`
        does: what "int8" or "int4" costs is the KL of `verify(a, a, quantize="int4")`.
      progress: shows progress bars on stderr when it is a terminal.

    Returns:
      what differs; `.same` says whether b is the model a, exactly or rounded to another type.

    Raises:
      CheckpointError, ConfigError, TokenizerError: one of them cannot be read.
      RequestError: `quantize` without `logits`.
    """
    from alaya_jax.checkpoint.verification import compare  # imports flax, which takes a while

    if quantize is not None and not logits:
        raise RequestError("quantize changes the logits alone; leave it out, or ask for logits")
    one, two = open_checkpoint(a), open_checkpoint(b)
    scheme = _scheme_for(quantize, two)
    return compare(one, two, logits=logits, quantize=scheme, progress=progress)


@under_own_settings
def verify_against(
    path: str | os.PathLike[str],
    peer: Literal["transformers"] = "transformers",
    *,
    python: str | None = None,
    progress: bool = True,
) -> "PeerVerification":
    """Compares the logits that this library and another program compute from one checkpoint.

    Args:
      path: a Hugging Face directory.
      peer: the other program. It holds the whole model, in float32.
      python: an interpreter that has torch and transformers; None: this one.
      progress: shows a progress bar on stderr when it is a terminal.

    Raises:
      CheckpointError, ConfigError, TokenizerError: the checkpoint cannot be read.
      RequestError: it is of another format, or the peer cannot run.
    """
    if peer != "transformers":
        raise RequestError(f"cannot compare with {peer!r}; there is 'transformers'")
    from alaya_jax.checkpoint.peer import against_transformers

    return against_transformers(open_checkpoint(path), python, progress=progress)


def open_checkpoint(path_or_name: str | os.PathLike[str]) -> Source:
    """Opens a checkpoint without reading weights: config and the table of tensors.

    Raises:
      CheckpointError, ConfigError: as `read_checkpoint`.
    """
    path = locate(path_or_name)
    if path.is_dir():
        if orbax.is_orbax(path):
            return orbax.open_orbax(path)
        return open_meta(path) if is_meta(path) else open_hf(path)
    return open_gguf(path)


def locate(path_or_name: str | os.PathLike[str]) -> Path:
    """The directory or file that a path or a bundled name means, absolute.

    Raises:
      CheckpointError: nothing is there; it lists what was tried and what to do.
    """
    path = absolute(Path(path_or_name))
    if path.suffix == ".safetensors" and path.is_file():
        raise CheckpointError(
            f"{path} is one file of an HF checkpoint; name its directory, {path.resolve().parent}"
        )
    if path.exists():
        return path
    name = os.fspath(path_or_name)
    if name in bundled.MODELS:
        if (found := bundled.find(name)) is not None:
            return absolute(found)
        places = "\n  - ".join(str(place) for place in bundled.places(name))
        raise CheckpointError(
            f"the bundled model {name!r} is not on this machine. Get it with: alaya fetch {name}\n"
            f"Looked for:\n  - {places}"
        )
    raise CheckpointError(
        f"no checkpoint {name!r}: there is no such directory or file (from {Path.cwd()}), and it "
        f"is no bundled model. Bundled are: {', '.join(bundled.MODELS)} (get one: alaya fetch NAME)"
    )


def _check_dtype(dtype: Any) -> np.dtype:
    try:
        result = jax.numpy.dtype(dtype)
    except TypeError:
        result = None
    if result is None or result.name not in _DTYPES:
        raise ConfigError(f"dtype = {dtype!r} is not a type for parameters; use one of {_DTYPES}")
    return result
