"""A kernel on a device, held against its operation's reference on random inputs."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from alaya_jax.pallas_kernels.dispatch import Target


@dataclasses.dataclass(frozen=True)
class AgainstReference:
    """The `checks` of an operation's module.

    Attributes:
      op: its name.
      shapes: what is checked on a device; `quick`, what a rehearsal on a CPU checks.
      inputs: `(shape, seed) -> arrays`.
      call: `(implementation, target, *arrays) -> result`.
      difference: of two results; at most `tolerance`.
    """

    op: str
    shapes: Sequence[Any]
    quick: Sequence[Any]
    inputs: Callable[[Any, int], tuple[Any, ...]]
    call: Callable[..., Any]
    difference: Callable[[Any, Any], float]
    tolerance: float

    def __call__(
        self, target: Target | None, quick: bool
    ) -> Iterator[tuple[str, Callable[[], str | None]]]:
        """(name, function that gives what is wrong, or None) of every case."""
        for seed, shape in enumerate(self.quick if quick else self.shapes):
            yield f"{self.op} {shape}", functools.partial(self._wrong, shape, target, seed)

    def _wrong(self, shape: Any, target: Target | None, seed: int) -> str | None:
        arrays = self.inputs(shape, seed)
        got, wanted = (
            jax.jit(functools.partial(self.call, implementation, target))(*arrays)
            for implementation in ("mosaic_gpu", "reference")
        )
        error = self.difference(got, wanted)
        return None if error < self.tolerance else f"differs from the reference by {error}"
