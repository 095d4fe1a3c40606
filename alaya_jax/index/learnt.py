"""What a model's sketches learn of its queries and keys: made from moments, kept in a file.

Moments are taken before RoPE, so that the text they come from need not be as long as the contexts
to come: a head's queries and keys turn with their position and are otherwise alike. Averages over
all positions up to a length follow by arithmetic. (Learnt after RoPE from 2,048 tokens, a basis
missed 1% of the critical keys of a context of 8,192; learnt this way, none in ten thousand.)
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from alaya_jax.checkpoint import beside
from alaya_jax.errors import RequestError
from alaya_jax.index.basis import Turned

LEAST_TOKENS = 2048
"""Tokens of text that a basis is learnt from, at least. A quarter did as well on SmolLM2-135M (at 1
bit 3.43% of all keys passed beside the critical ones; 3.38% with so many), but texts differ."""

VERSION = "1"

_LEAST_SHARE = 1e-4  # of a moment's largest eigenvalue, that others are taken to have at least


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Of a text's queries and keys, by layer and kv head; means over tokens or pages.

    Queries and keys are turned back: queries to position 0, keys as if their page began there.

    Attributes:
      queries: [L, K, D, D], of q q', over the heads of the group too.
      residuals: [L, K, D, D], of r r', r a key less its page's mean.
      centres: [L, K, D, D], of (c - m) (c - m)', c a page's mean, m the mean of these: keys may
        have much in common, which squared would hide their differences in float32.
      mean: [L, K, D], m.
    """

    queries: Float[Array, "L K D D"]
    residuals: Float[Array, "L K D D"]
    centres: Float[Array, "L K D D"]
    mean: Float[Array, "L K D"]


def joined(parts: "Sequence[tuple[Moments, int]]") -> dict[str, np.ndarray]:
    """Moments of texts of so many tokens each, together, by name; float64."""
    total = sum(tokens for _, tokens in parts)
    wide = [
        ({f.name: np.asarray(getattr(m, f.name), np.float64) for f in dataclasses.fields(m)}, n)
        for m, n in parts
    ]
    together = {name: np.sum([m[name] * n for m, n in wide], axis=0) / total for name in wide[0][0]}
    apart = [n * np.einsum("lkd,lke->lkde", *[m["mean"] - together["mean"]] * 2) for m, n in wide]
    together["centres"] = together["centres"] + np.sum(apart, axis=0) / total
    return together


@dataclasses.dataclass(frozen=True, eq=False)
class Learnt:
    """Of all layers of a model.

    Attributes:
      fingerprint: of the model.
      length: positions that it is meant for, below this.
      tokens: of the text it was learnt from.
      layers: what is learnt of each.
    """

    fingerprint: str
    length: int
    tokens: int
    layers: tuple[Turned, ...]

    @classmethod
    def of(
        cls,
        parts: "Sequence[tuple[Moments, int]]",
        inverse_frequencies: np.ndarray,
        length: int,
        fingerprint: str,
    ) -> "Learnt":
        """Learns from texts.

        Args:
          parts: moments and number of tokens of each text.
          inverse_frequencies: [D / 2], of the model's RoPE.
          length: positions to learn for.
          fingerprint: of the model.

        Raises:
          RequestError: it is too little text.
        """
        tokens = sum(n for _, n in parts)
        if tokens < LEAST_TOKENS:
            raise RequestError(
                f"calibrate: the texts have {tokens:,} tokens; to learn a sketch's basis it takes "
                f"{LEAST_TOKENS:,}: a basis of fewer misses keys, or lets too many pass"
            )
        turn = functools.partial(turned_to, inverse_frequencies, length)
        m = joined(parts)
        layers = []
        for i, of_layer in enumerate(m["mean"]):
            heads = []
            for h, mean in enumerate(of_layer):
                queries, residuals = turn(m["queries"][i, h]), turn(m["residuals"][i, h])
                common = _mean_turned_to(inverse_frequencies, length, mean)
                centres = turn(m["centres"][i, h] + np.outer(mean, mean))
                of_pages = np.diag(centres) - common**2
                heads.append(_turned(queries, residuals, of_pages, common))
            layers.append(Turned(*map(np.stack, zip(*heads, strict=True))))
        return cls(fingerprint, length, tokens, tuple(map(as_stored, layers)))

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        arrays = {
            name: np.stack([getattr(x, name) for x in self.layers]).astype(kind)
            for name, kind in _STORED.items()
        }
        said = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "length": str(self.length),
            "tokens": str(self.tokens),
        }
        beside.replace(path, safetensors.numpy.save(arrays, said))

    @classmethod
    def load(cls, path: Path) -> "Learnt":
        """Reads what `save` wrote.

        Raises:
          RequestError: it is damaged, or of another version.
        """
        try:
            with safetensors.safe_open(path, "numpy") as file:
                said = file.metadata() or {}
                if said.get("version") != VERSION:
                    raise ValueError(f"version {said.get('version')}")
                arrays = {name: file.get_tensor(name).astype(np.float64) for name in _STORED}
            if not all(np.isfinite(x).all() for x in arrays.values()):
                raise ValueError("numbers that are not finite")
            layers = tuple(
                Turned(**{name: x[i] for name, x in arrays.items()})
                for i in range(len(arrays["offset"]))
            )
            return cls(said["fingerprint"], int(said["length"]), int(said["tokens"]), layers)
        except (ValueError, KeyError, OSError, safetensors.SafetensorError) as error:
            raise RequestError(
                f"{path} is no basis for sketches, or one of another version ({error}); delete it, "
                "or calibrate again"
            ) from error

    def __str__(self) -> str:
        return f"a basis learnt from {self.tokens:,} tokens, for {self.length:,} positions"


def keep(learnt: Learnt, directory: Path | None) -> Path:
    """Saves it in the first place that can be written; says where.

    Raises:
      OSError: none can be.
    """
    return beside.keep(learnt.save, _places(learnt.fingerprint, directory))


def find(fingerprint: str, directory: Path | None) -> Learnt | None:
    """What was learnt of a model, if it was: the user's own before what this package brings.

    Raises:
      RequestError: it is damaged.
    """
    brought = _BROUGHT / beside.file_name("basis", fingerprint, ".safetensors")
    there = [p for p in (*_places(fingerprint, directory), brought) if p.is_file()]
    return Learnt.load(there[0]) if there else None


def _places(fingerprint: str, directory: Path | None) -> list[Path]:
    return beside.places("basis", fingerprint, ".safetensors", directory)


_BROUGHT = Path(__file__).parent

_STORED = {"rows": np.float16, "spread": np.float32, "offset": np.float32, "grain": np.float32}
"""Arrays of a file, [L, K, ...]."""


def as_stored(layer: Turned) -> Turned:
    """As it is once it was in a file: the basis in use does not depend on where it came from."""
    arrays = {name: getattr(layer, name).astype(kind) for name, kind in _STORED.items()}
    return Turned(**{name: x.astype(np.float64) for name, x in arrays.items()})


def _turned(
    queries: np.ndarray, residuals: np.ndarray, of_pages: np.ndarray, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`Turned` of one head, from second moments [D, D], the variances of pages' means [D] and the
    mean key [D].
    """
    values, vectors = np.linalg.eigh(queries)
    most = values[-1] if values[-1] > 0 else 1.0
    values = np.maximum(values, _LEAST_SHARE * most)
    root = (vectors * np.sqrt(values)) @ vectors.T
    variance, axes = np.linalg.eigh(root @ residuals @ root)
    variance, axes = variance[::-1], axes[:, ::-1]
    most = variance[0] if variance[0] > 0 else 1.0
    spread = np.sqrt(np.maximum(variance, 1e-8 * most))
    of_pages = np.maximum(of_pages, 1e-8 * max(of_pages.max(), 2.0**-40))
    grain = np.exp2(np.round(np.log2(np.sqrt(of_pages))))
    return (axes.T @ root) / spread[:, None], spread, mean, grain


def turned_to(inverse_frequencies: np.ndarray, length: int, moment: np.ndarray) -> np.ndarray:
    """A second moment [D, D] of vectors that RoPE turns to positions below `length`, each as often.

    With z = x[:D/2] + i x[D/2:], RoPE multiplies z_j by exp(i w_j p); of the products z_j z_k* and
    z_j z_k the mean over p is known.
    """
    half = len(inverse_frequencies)
    w = np.asarray(inverse_frequencies, np.float64)
    aa, ab, ba, bb = (moment[i : i + half, j : j + half] for i in (0, half) for j in (0, half))
    crossed = (aa + bb + 1j * (ba - ab)) * _mean_turn(w[:, None] - w, length)
    same = (aa - bb + 1j * (ba + ab)) * _mean_turn(w[:, None] + w, length)
    return np.block(
        [
            [(crossed + same).real / 2, (same - crossed).imag / 2],
            [(crossed + same).imag / 2, (crossed - same).real / 2],
        ]
    )


def _mean_turned_to(inverse_frequencies: np.ndarray, length: int, mean: np.ndarray) -> np.ndarray:
    """Likewise a mean [D]."""
    half = len(inverse_frequencies)
    z = mean[:half] + 1j * mean[half:]
    z = z * _mean_turn(np.asarray(inverse_frequencies, np.float64), length)
    return np.concatenate([z.real, z.imag])


def _mean_turn(w: np.ndarray, length: int) -> np.ndarray:
    """Mean of exp(i w p) over positions 0 <= p < length."""
    angle = w * length / 2
    return np.sinc(angle / np.pi) * np.exp(1j * angle)
