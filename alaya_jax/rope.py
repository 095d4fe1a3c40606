"""RoPE stretched when a model is loaded, for contexts longer than its checkpoint declares.

A stretched RoPE gives other keys, so the model is another one to a database: `stretched` names it.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any, Literal, get_args

from alaya_jax.errors import ConfigError, RequestError
from alaya_jax.models.config import ROPE_FIELDS, LlamaConfig, RopeConfig

Kind = Literal["linear", "dynamic", "yarn", "llama3"]

_OURS = (
    "factor",
    "original_max_position_embeddings",
)  # spelled otherwise here, or the same for all


@dataclasses.dataclass(frozen=True)
class Rope:
    """How a model's RoPE is stretched on load: `aj.load(path, rope=aj.Rope("yarn", 4.0))`.

    It takes the place of what `rope_scaling` in the checkpoint's config.json says. A model that was
    not trained with it answers worse, the more so the larger the factor; YaRN loses least without
    training.

    Attributes:
      kind: "linear" (positions divided by the factor), "dynamic" (NTK: theta is raised, for the one
        length that is served), "yarn" (arXiv 2309.00071) or "llama3" (Llama 3.1).
      factor: how many times longer than the original length, at least 1.
      original_length: tokens before stretching; None: what the checkpoint declares, or where its
        RoPE is stretched already, what that was stretched from.
      theta: base wavelength; None: the checkpoint's.
      low_freq_factor, high_freq_factor: llama3 only; None: 1 and 4, as Llama 3.1.
      attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate: yarn only, as in
        config.json; None: what transformers takes where they are left out.

    Raises:
      RequestError: a kind or number that is none, or a field of another kind.
    """

    kind: Kind
    factor: float
    original_length: int | None = None
    _: dataclasses.KW_ONLY
    theta: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise RequestError(
                f"Rope({self.kind!r}): use one of {', '.join(map(repr, get_args(Kind)))}"
            )
        number = isinstance(self.factor, int | float) and not isinstance(self.factor, bool)
        if not number or not 1 <= self.factor < math.inf:
            raise RequestError(
                f"Rope(factor={self.factor!r}): must be a number, at least 1; the served length is "
                "that many times the original one"
            )
        length = self.original_length
        if length is not None and (not isinstance(length, int) or length < 1):
            raise RequestError(f"Rope(original_length={length!r}): must be a number of tokens")
        known = {"theta", *ROPE_FIELDS[self.kind]}
        foreign = [name for name in self._own_fields() if name not in known]
        if foreign:
            raise RequestError(
                f"Rope({self.kind!r}, {foreign[0]}=...): this kind has no such number; it takes "
                f"{', '.join(sorted(known - set(_OURS)))}"
            )
        try:
            self._of(10_000.0, 1)
        except ConfigError as error:
            raise RequestError(f"Rope({self.kind!r}): {error}") from error

    def _own_fields(self) -> dict[str, Any]:
        """What is given beside kind, factor and length."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.kw_only}
        return {name: value for name, value in fields.items() if value is not None}

    def _of(self, theta: float, original: int) -> RopeConfig:
        factor = float(self.factor)
        fields: dict[str, Any] = {"theta": theta, **self._own_fields()}
        return RopeConfig(
            self.kind, factor=factor, original_max_position_embeddings=original, **fields
        )

    def applied_to(self, config: LlamaConfig) -> LlamaConfig:
        """The architecture with this RoPE.

        Raises:
          RequestError: the checkpoint's RoPE is stretched, and does not say from what length.
        """
        rope, declared = config.rope, config.max_position_embeddings
        original = self.original_length or rope.original_max_position_embeddings
        if original is None and rope.rope_type == "linear":
            raise RequestError(
                f"Rope({self.kind!r}, {self.factor}): the checkpoint's RoPE is {rope.rope_type} by "
                f"{rope.factor:g} already, and does not say from what length; give "
                "original_length=..., in tokens"
            )
        original = original or declared
        # Dynamic RoPE counts from `max_position_embeddings`; of the others it is the new length.
        now = original if self.kind == "dynamic" else round(original * self.factor)
        return dataclasses.replace(
            config,
            rope=self._of(rope.theta, original),
            max_position_embeddings=now,
            max_sequence_length=None,
        )


def stretched(config: LlamaConfig, fingerprint: str, rope: Rope | None) -> tuple[LlamaConfig, str]:
    """A checkpoint's architecture and fingerprint as loaded with `rope`: the fingerprint is another
    wherever the keys are.
    """
    if rope is None:
        return config, fingerprint
    if not isinstance(rope, Rope):
        raise RequestError(f"rope={rope!r}: give aj.Rope(kind, factor), such as Rope('yarn', 4.0)")
    new = rope.applied_to(config)
    numbers = _numbers(new)
    if numbers == _numbers(config):
        return new, fingerprint
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
    return new, f"{fingerprint}-{rope.kind}{rope.factor:g}-{digest[:12]}"


def _numbers(config: LlamaConfig) -> dict[str, Any]:
    """All that rotation depends on, but the length that dynamic RoPE is served for."""
    original = config.max_position_embeddings if config.rope.rope_type == "dynamic" else None
    return config.in_digest()["rope_parameters"] | {"dynamic": original}
