"""A proof that two checkpoints are the same model: configs, every tensor, logits of a fixed prompt.

Both are read tensor by tensor and the logits are computed layer by layer, so that it needs memory
for about two layers in float32, whatever the size of the model.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from alaya_jax.checkpoint.conversion import PROMPT
from alaya_jax.checkpoint.names import Entry
from alaya_jax.checkpoint.params import match
from alaya_jax.checkpoint.quantization import is_quantizable, quantized_kernel
from alaya_jax.checkpoint.source import Source, StoredTensor
from alaya_jax.checkpoint.weights import Weight, blocks, cast
from alaya_jax.models import rope
from alaya_jax.models.config import LlamaConfig
from alaya_jax.models.llama import DecoderLayer, RMSNorm, causal_attend
from alaya_jax.models.quantized import Scheme
from alaya_jax.models.tokenizer import Tokenizer
from alaya_jax.progress import progress_bar

_TOKENS = 32  # of the prompt, where no tokenizer says how to write it
_EQUAL, _DIFFERENT = "equal", "different"
_ROUNDED = {
    "rounded to bfloat16": np.dtype(ml_dtypes.bfloat16),
    "rounded to float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class TensorDifference:
    """A tensor whose values are not equal in both checkpoints.

    Attributes:
      name: as HF calls it.
      relation: "rounded to bfloat16" or "rounded to float16" when one is exactly the other, cast;
        else "different", "missing" (in b), "unexpected" (not in a) or "of another shape".
      count: values that differ.
      max_difference: largest absolute difference.
    """

    name: str
    relation: str
    count: int = 0
    max_difference: float = 0.0


@dataclasses.dataclass(frozen=True)
class LogitsDifference:
    """How far the two models' predictions are apart, in float32, on the fixed prompt.

    Attributes:
      tokens: length of the prompt.
      max_difference: largest absolute difference of a logit.
      mean_kl, max_kl: KL(a || b) of the next-token distributions in nats, over the positions.
      top1_agreement: share of positions where both find the same token most likely.
    """

    tokens: int
    max_difference: float
    mean_kl: float
    max_kl: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens: largest difference {self.max_difference:.3g}, "
            f"KL mean {self.mean_kl:.3g} max {self.max_kl:.3g} nats, "
            f"same best token at {self.top1_agreement:.1%}"
        )


@dataclasses.dataclass(frozen=True)
class Verification:
    """What two checkpoints have in common and where they differ.

    Attributes:
      a, b: the checkpoints.
      config: field -> its values in a and in b, where they differ; `dtype` does not count when the
        tensors are equal, or one is the other rounded.
      tokenizer: what differs between the tokenizers, a line each.
      tensors: number of tensors compared.
      equal: how many of them are equal in every value.
      differences: the others.
      logits: None when it was not asked for, or the shapes do not allow it.
      quantize: how the weights of b were quantized for its logits; None: they were not.
    """

    a: Path
    b: Path
    config: dict[str, tuple[Any, Any]]
    tokenizer: tuple[str, ...]
    tensors: int
    equal: int
    differences: tuple[TensorDifference, ...]
    logits: LogitsDifference | None
    quantize: Scheme | None = None

    @property
    def same(self) -> bool:
        """Whether b is the model a, exactly or rounded to another type."""
        rounded = all(d.relation in _ROUNDED for d in self.differences)
        return rounded and not self.tokenizer and not self.config.keys() - {"dtype"}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `alaya verify --json` prints it."""
        data = dataclasses.asdict(self) | {"a": str(self.a), "b": str(self.b)}
        return {"same": self.same} | data

    def __str__(self) -> str:
        lines = [f"{self.b} {'is' if self.same else 'is NOT'} the model {self.a}"]
        lines += [f"  config {k}: {a!r} in a, {b!r} in b" for k, (a, b) in self.config.items()]
        lines += [f"  tokenizer: {line}" for line in self.tokenizer]
        lines.append(f"  tensors: {self.equal} of {self.tensors} equal in every value")
        relations = [d.relation for d in self.differences]
        for relation in sorted(set(relations) & _ROUNDED.keys()):
            widest = max(d.max_difference for d in self.differences if d.relation == relation)
            lines.append(f"    {relations.count(relation)} {relation}, by up to {widest:.3g}")
        for d in self.differences:
            if d.relation not in _ROUNDED:
                where = f": {d.count:,} values, by up to {d.max_difference:.3g}" if d.count else ""
                lines.append(f"    {d.name} is {d.relation}{where}")
        if self.logits:
            kept = f" (b quantized to {self.quantize})" if self.quantize else ""
            lines.append(f"  {self.logits}{kept}")
        return "\n".join(lines)


def compare(
    a: Source, b: Source, *, logits: bool, quantize: Scheme | None, progress: bool
) -> Verification:
    """Compares two opened checkpoints; see `alaya_jax.checkpoint.verify`."""
    pairs_a, pairs_b = match(a), match(b)
    tokenizer_a, tokenizer_b = a.read_tokenizer(), b.read_tokenizer()
    one, other = a.config.lengths_apart(), b.config.lengths_apart()
    config = {
        f.name: (getattr(one, f.name), getattr(other, f.name))
        for f in dataclasses.fields(LlamaConfig)
        if getattr(one, f.name) != getattr(other, f.name)
        and not (f.name == "eos_token_ids" and _same_ends(a.config, b.config))
    }
    own = {entry.hf: weight_of(a, entry, tensor) for entry, tensor in pairs_a}
    others = {entry.hf: weight_of(b, entry, tensor) for entry, tensor in pairs_b}
    differences = [
        *(TensorDifference(name, "missing") for name in own.keys() - others.keys()),
        *(TensorDifference(name, "unexpected") for name in others.keys() - own.keys()),
    ]
    both = [name for name in own if name in others]
    total = sum(own[name].nbytes for name in both)
    with progress_bar("comparing weights", total, "bytes", show=progress) as advance:
        for name in both:
            difference = _compare(own[name], others[name])
            if difference.relation != _EQUAL:
                differences.append(difference)
            advance(own[name].nbytes)
    logits_difference = None
    if logits and a.config.vocab_size == b.config.vocab_size:
        tokens = fixed_prompt(a.config, tokenizer_a)
        total = sum(w.nbytes for w in (*own.values(), *others.values()))
        with progress_bar("computing logits", total, "bytes", show=progress) as advance:
            first = stream_logits(a.config, own, tokens, advance)
            logits_difference = compare_logits(
                first, stream_logits(b.config, others, tokens, advance, quantize)
            )
    return Verification(
        a=a.path,
        b=b.path,
        config=config,
        tokenizer=tuple(_compare_tokenizers(tokenizer_a, tokenizer_b)),
        tensors=len(own.keys() | others.keys()),
        equal=len(own.keys() | others.keys()) - len(differences),
        differences=tuple(differences),
        logits=logits_difference,
        quantize=quantize,
    )


def _same_ends(a: LlamaConfig, b: LlamaConfig) -> bool:
    """Whether the same ids end a text; their order means nothing."""
    return set(a.eos_token_ids) == set(b.eos_token_ids)


def weight_of(source: Source, entry: Entry, tensor: StoredTensor) -> Weight:
    """A stored tensor in its own type."""
    assert tensor.dtype is not None  # refused by match
    return Weight(entry, tensor, source.format, tensor.dtype)


def _compare(a: Weight, b: Weight) -> TensorDifference:
    name = a.entry.hf
    if a.entry.stored_shape != b.entry.stored_shape:
        return TensorDifference(name, "of another shape")
    relations = {_EQUAL, *_ROUNDED}
    count, largest = 0, 0.0
    wide = np.dtype(np.float32)  # holds all three types exactly
    parts = zip(blocks(a.layout("hf"), wide), blocks(b.layout("hf"), wide), strict=True)
    for x, y in parts:
        same = _same(x, y)
        if same.all():
            relations -= {r for r in relations & _ROUNDED.keys() if not _is_rounding(x, y, r)}
            continue
        relations.discard(_EQUAL)
        count += int(np.count_nonzero(~same))
        with np.errstate(invalid="ignore", over="ignore"):
            largest = max(largest, float(np.max(np.abs(x - y), where=~same, initial=0.0)))
        relations -= {r for r in relations if not _is_rounding(x, y, r)}
    a.tensor.release()
    b.tensor.release()
    if _EQUAL in relations:
        return TensorDifference(name, _EQUAL)
    return TensorDifference(name, min(relations, default=_DIFFERENT), count, largest)


def _same(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Equal bit by bit, so that 0 and -0 differ, but any two NaNs are one."""
    return (x.view(np.uint32) == y.view(np.uint32)) | (np.isnan(x) & np.isnan(y))


def _is_rounding(x: np.ndarray, y: np.ndarray, relation: str) -> bool:
    def rounded(values: np.ndarray) -> np.ndarray:
        return cast(cast(values, _ROUNDED[relation]), values.dtype)

    return bool(_same(rounded(x), y).all() or _same(x, rounded(y)).all())


def fixed_prompt(config: LlamaConfig, tokenizer: Tokenizer | None) -> np.ndarray:
    """The ids of `PROMPT`, int32 [T]; where no tokenizer says them, fixed random ones."""
    if tokenizer is not None:
        ids = tokenizer.encode(PROMPT)
        if ids.max() < config.vocab_size:
            return ids
    return np.random.default_rng(0).integers(0, config.vocab_size, _TOKENS, dtype=np.int32)


def stream_logits(
    config: LlamaConfig,
    weights: dict[str, Weight],
    tokens: np.ndarray,
    advance: Callable[[int], None] = lambda count: None,
    quantize: Scheme | None = None,
) -> np.ndarray:
    """Logits of a prompt, float32 [T, V], with one layer of the model in memory at a time.

    Args:
      config: architecture.
      weights: every parameter, by its HF name.
      tokens: int32 [T].
      advance: called with the number of bytes read.
      quantize: how to keep the matrices; None: as they are.
    """
    config = dataclasses.replace(config, dtype="float32")  # one program whatever is stored
    inverse, factor = rope.inverse_frequencies(config, len(tokens))
    rotary = rope.rotation(jnp.arange(len(tokens))[None], inverse, factor)
    embedding = weights["model.embed_tokens.weight"]
    if not is_quantizable(embedding.entry, embedding.tensor, quantize):
        x = jnp.asarray(embedding.layout("orbax")[tokens][None].astype(np.float32))
        embedding.tensor.release()
    else:
        x = _leaf(embedding, quantize).rows(tokens[None])
    layers: dict[str, list[Weight]] = {}
    for weight in weights.values():
        layers.setdefault(weight.entry.path[0], []).append(weight)
    for i in range(config.num_hidden_layers):
        x = _layer(_tree(layers[f"layers_{i}"], quantize), config, x, rotary).block_until_ready()
        advance(sum(w.nbytes for w in layers[f"layers_{i}"]))
    norm = {"scale": _leaf(layers["norm"][0], None)}
    x = RMSNorm(config.rms_norm_eps, jnp.float32).apply({"params": norm}, x)
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    if not is_quantizable(head.entry, head.tensor, quantize):
        hidden = np.asarray(x)[0]
        rows = blocks(head.layout("hf"), np.dtype(np.float32))
        logits = np.concatenate([hidden @ block.T for block in rows], axis=1)
        head.tensor.release()
    else:
        kernel = _leaf(head, quantize)
        logits = np.asarray(
            kernel.contract_last(x[0]) if head is embedding else kernel.contract(x[0], 1)
        )
    advance(sum(w.nbytes for w in weights.values() if not w.entry.path[0].startswith("layers_")))
    return logits


@functools.partial(jax.jit, static_argnames="config")
def _layer(params: dict[str, Any], config: LlamaConfig, x: Any, rotary: Any) -> Any:
    attend = functools.partial(causal_attend, 0)
    with jax.default_matmul_precision("highest"):
        return DecoderLayer(config, jnp.float32).apply({"params": params}, x, rotary, attend, None)[
            0
        ]


def _tree(weights: list[Weight], quantize: Scheme | None) -> dict[str, Any]:
    """The parameters of one layer in float32, by the keys below the layer's own."""
    tree: dict[str, Any] = {}
    for weight in weights:
        node = tree
        for key in weight.entry.path[1:-1]:
            node = node.setdefault(key, {})
        node[weight.entry.path[-1]] = _leaf(weight, quantize)
    return tree


def _leaf(weight: Weight, quantize: Scheme | None) -> Any:
    """A parameter on the device; waits until it is there, so that the host holds no second copy of
    the layer.
    """
    entry, tensor, wide = weight.entry, weight.tensor, np.dtype(np.float32)
    if quantize is None or not is_quantizable(entry, tensor, quantize):
        leaf: Any = jnp.asarray(cast(weight.layout("orbax"), wide))
    else:

        def place(array: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
            return jnp.asarray(array)

        leaf = quantized_kernel(entry, tensor, weight.format, quantize, wide, place)
    jax.block_until_ready(leaf)
    tensor.release()
    return leaf


def compare_logits(a: np.ndarray, b: np.ndarray) -> LogitsDifference:
    """How far two models' logits, float32 [T, V], are apart."""
    log_a, log_b = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a, b))
    kl = np.sum(np.exp(log_a) * (log_a - log_b), axis=-1)
    return LogitsDifference(
        tokens=len(a),
        max_difference=float(np.abs(a - b).max()),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1_agreement=float(np.mean(a.argmax(-1) == b.argmax(-1))),
    )


def _compare_tokenizers(a: Tokenizer | None, b: Tokenizer | None) -> Iterator[str]:
    if a is None or b is None:
        if a is not b:
            yield f"only {'b' if a is None else 'a'} has one"
        return
    for name in ("vocab_size", "bos_id"):
        if getattr(a, name) != getattr(b, name):
            yield f"{name} is {getattr(a, name)} in a and {getattr(b, name)} in b"
    if set(a.eos_ids) != set(b.eos_ids):
        yield f"eos_ids are {sorted(a.eos_ids)} in a and {sorted(b.eos_ids)} in b"
    if a.encode(PROMPT).tolist() != b.encode(PROMPT).tolist():
        yield "the fixed prompt becomes other ids"
    if (a.chat and a.chat.sources) != (b.chat and b.chat.sources):
        yield "the chat templates differ"
