"""A loaded model: architecture, weights on their devices, tokenizer."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from alaya_jax.checkpoint import read_checkpoint
from alaya_jax.checkpoint.identity import identify_arrays
from alaya_jax.compilation import keep_programs
from alaya_jax.errors import RequestError, TokenizerError
from alaya_jax.frame import Frame
from alaya_jax.models.chat import ChatTemplate
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.llama import Params
from alaya_jax.models.quantized import QuantizedMatrix, Scheme
from alaya_jax.models.tokenizer import Tokenizer
from alaya_jax.pallas_kernels.dispatch import Target, target_of
from alaya_jax.rope import Rope, stretched
from alaya_jax.settings import under_own_settings
from alaya_jax.sharding import ShardingRules, auto_axes

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Named:
    """A fingerprint, and what it was given or made for."""

    fingerprint: str
    config: LlamaConfig
    arrays: list[Any]
    tree: Any  # with what a matrix holds beside its arrays

    def holds_for(self, config: LlamaConfig, params: Params) -> bool:
        """Whether these are config and arrays; an array is another when it was made anew."""
        arrays, tree = jax.tree.flatten(params)
        same = tree == self.tree and all(a is b for a, b in zip(arrays, self.arrays, strict=True))
        return same and config == self.config


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Model:
    """A Llama and what belongs to it.

    Attributes:
      config: architecture.
      params: parameter pytree; see `models.llama`.
      tokenizer: None when the checkpoint has none; token ids work all the same.
      name: for people.
      mesh, rules: where the parameters lie; no mesh is the default device.
      max_length: longest sequence, tokens; None: what the checkpoint declares.
      directory: of the checkpoint's files; None where it is one file, or was not read from any.
      layers_per_program: most layers of a compiled program; None: about five. As many as the model
        has is one program for all: the least work between them, and the longest to compile.
    """

    config: LlamaConfig
    params: Params
    tokenizer: Tokenizer | None
    name: str
    mesh: Mesh | None
    rules: ShardingRules
    max_length: int | None
    directory: Path | None
    layers_per_program: int | None
    _named: _Named | None

    def __init__(  # noqa: PLR0913 - its keywords are its settings
        self,
        config: LlamaConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        fingerprint: str = "",
        name: str = "model",
        mesh: Mesh | None = None,
        rules: ShardingRules | None = None,
        max_length: int | None = None,
        directory: Path | None = None,
        *,
        layers_per_program: int | None = None,
        _named: _Named | None = None,
    ):
        """A model of parameters in memory; `load` reads one.

        Args:
          fingerprint: names this config and these weights; without it, a digest of them is made
            when it is first asked for. `dataclasses.replace` with other parameters, or another
            config, makes it anew.
          The rest: see the attributes.
        """
        if fingerprint:
            _named = _Named(fingerprint, config, *jax.tree.flatten(params))
        elif _named is not None and not _named.holds_for(config, params):
            _named = None
        fields = {"config": config, "params": params, "tokenizer": tokenizer, "name": name}
        fields |= {"mesh": mesh, "rules": rules or ShardingRules(), "max_length": max_length}
        fields |= {"directory": directory, "layers_per_program": layers_per_program}
        for field, value in (fields | {"_named": _named}).items():
            object.__setattr__(self, field, value)

    @property
    def fingerprint(self) -> str:
        """Of config, weights and RoPE; contexts of another fingerprint are not reused.

        Raises:
          RequestError: it was not given, and the parameters are spread over several processes.
        """
        named = self._named
        if named is None or not named.holds_for(self.config, self.params):  # or put in their place
            made = identify_arrays(self.config, self.params)
            named = _Named(made, self.config, *jax.tree.flatten(self.params))
            object.__setattr__(self, "_named", named)
        return served_as(named.fingerprint, self.config, self.max_length)

    @property
    def dtype(self) -> np.dtype:
        """Type that the model computes in, and of its keys and values: that of the embeddings."""
        return self.params["embed"]["embedding"].dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, all layers."""
        return self.config.kv_width * self.dtype.itemsize

    @property
    def target(self) -> Target:
        """What its programs are compiled for."""
        return target_of(self.mesh)

    @property
    def length_limit(self) -> int:
        """Longest sequence that is served, tokens."""
        return self.max_length or self.config.max_length

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text: those of the config, then the tokenizer's."""
        return *self.config.eos_token_ids, *(self.tokenizer.eos_ids if self.tokenizer else ())

    @property
    def way_to_longer(self) -> str:
        """What to do about a sequence that is longer."""
        longest = self.config.longest
        if longest > self.length_limit:
            return f"load it with max_length={longest}, which its RoPE allows"
        return "stretch it on load: rope=aj.Rope('yarn', 4.0)"

    @property
    def rope_length(self) -> int | None:
        """The length that dynamic RoPE is stretched for; None for other types."""
        return self.length_limit if self.config.rope.rope_type == "dynamic" else None

    @property
    def frame(self) -> Frame:
        """What its programs are compiled for."""
        return Frame(self.config, self.rope_length, self.mesh, self.rules)

    @property
    def chat(self) -> ChatTemplate:
        """The chat template.

        Raises:
          TokenizerError: the checkpoint has none.
        """
        if self.tokenizer is None or self.tokenizer.chat is None:
            raise TokenizerError(
                f"{self.name} has no chat template; give it text to continue, or put "
                "tokenizer_config.json of a chat model beside the weights"
            )
        return self.tokenizer.chat

    def encode(self, text: str, **options: Any) -> np.ndarray:
        """Token ids of a text, int32 [n]; options as in `Tokenizer.encode`.

        Raises:
          TokenizerError: the checkpoint has no tokenizer.
        """
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self.name} has no tokenizer, so text cannot be encoded; pass token ids, or put "
                "tokenizer.json beside the weights"
            )
        return self.tokenizer.encode(text, **options)

    def check_tokens(self, tokens: Any) -> np.ndarray:
        """Token ids as int32 [n].

        Raises:
          RequestError: not a list of whole numbers, or an id outside the vocabulary.
        """
        try:
            ids = np.asarray(tokens)
        except ValueError:  # rows of unequal length
            ids = np.asarray(tokens, object)
        if ids.size == 0:
            return np.zeros(0, np.int32)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError(
                f"token ids must be whole numbers [n], got {ids.dtype} {ids.shape}; encode text "
                "with model.encode(text)"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise RequestError(
                f"token ids reach from {ids.min()} to {ids.max()}, the vocabulary of {self.name} "
                f"from 0 to {self.config.vocab_size - 1}; encode the text with this model's "
                "tokenizer"
            )
        return ids.astype(np.int32)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params, is_leaf=_is_quantized)
        kinds = sorted({leaf.scheme for leaf in leaves if _is_quantized(leaf)})
        count = sum(leaf.size for leaf in leaves)
        place = f"mesh {dict(self.mesh.shape)}" if self.mesh else str(jax.devices()[0])
        kept = f", weights in {', '.join(kinds)}" if kinds else ""
        return (
            f"Model({self.name}, {count / 1e6:,.1f}M parameters, {self.dtype.name}{kept}, "
            f"up to {self.length_limit:,} tokens, on {place})"
        )


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedMatrix)


@under_own_settings
def load(  # noqa: PLR0913 - its keywords are its settings
    path_or_name: str | os.PathLike[str],
    mesh: Mesh | None = None,
    dtype: Any = None,
    *,
    quantize: Scheme | None = None,
    rules: ShardingRules | None = None,
    max_length: int | None = None,
    rope: Rope | None = None,
    layers_per_program: int | None = None,
    compilation_cache: bool | str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Model:
    """Loads a model.

    Args:
      path_or_name: an HF directory, a GGUF file, or a bundled name such as "smollm2-135m".
      mesh: where the parameters go, tensor by tensor; see `make_mesh`. Its axes are used as Auto.
      dtype: of all parameters; None keeps what is stored (see `checkpoint.read_checkpoint`).
      quantize: "int8" or "int4" keeps the weights in that form, "stored" in the groups of 8 or 4
        bits that a quantized GGUF file holds: less memory, and faster tokens on a CPU; a different
        model from the dense one, with stored contexts of its own.
      rules: which axis goes where; default `ShardingRules()`.
      max_length: longest sequence to serve, tokens; default what the checkpoint declares, at most
        what its RoPE is stretched for (`LlamaConfig.longest`: more where the config keeps the
        length before stretching). Dynamic RoPE is stretched for it: choose it as short as will do.
      rope: stretches RoPE in place of what the checkpoint says: a different model again, with
        stored contexts of its own.
      layers_per_program: most layers of a compiled program; None: about five, which compiles in a
        fraction of the time. As many as the model has: one program for all, which is for meshes
        where calling programs costs more than compiling them once.
      compilation_cache: where compiled programs are kept for later processes; a directory, False
        for nowhere, None for the user's cache folder. See `alaya_jax.compilation`.
      progress: shows a bar on stderr when it is a terminal.

    Raises:
      RequestError: `layers_per_program` is not at least 1; `max_length` is not from 1 to what RoPE
        is stretched for; `rope` lacks a length.
      CheckpointError, ConfigError, TokenizerError: the checkpoint is missing, damaged or not
        understood; or the mesh has an axis that no rule uses.
    """
    if layers_per_program is not None and layers_per_program < 1:
        raise RequestError(f"load: layers_per_program={layers_per_program}; give at least 1")
    rules = rules or ShardingRules()
    if mesh is not None:
        rules.require_used(mesh.shape)
        mesh = auto_axes(mesh)
    try:
        keep_programs(compilation_cache)
    except OSError as error:
        _log.warning("compiled programs are not kept: %s", error)
    read = read_checkpoint(
        path_or_name, mesh=mesh, rules=rules, dtype=dtype, quantize=quantize, progress=progress
    )
    config, fingerprint = stretched(read.config, read.fingerprint, rope)
    if max_length is not None and not 1 <= max_length <= config.longest:
        what = f"declares {config.longest:,}"
        if config.longest > config.max_position_embeddings:
            what = f"has RoPE for {config.longest:,}"
        raise RequestError(
            f"load: max_length={max_length}; {path_or_name} {what}. For more, stretch its RoPE: "
            "rope=aj.Rope('yarn', 4.0)"
        )
    return Model(
        config=config,
        params=read.params,
        tokenizer=read.tokenizer,
        fingerprint=fingerprint,
        name=Path(path_or_name).name,
        mesh=mesh,
        rules=rules,
        max_length=max_length,
        directory=read.source if read.source.is_dir() else None,
        layers_per_program=layers_per_program,
    )


def served_as(fingerprint: str, config: LlamaConfig, max_length: int | None = None) -> str:
    """The fingerprint of a checkpoint's keys: with dynamic RoPE they depend on the length."""
    if config.rope.rope_type != "dynamic":
        return fingerprint
    return f"{fingerprint}-rope{max_length or config.max_length}"
