"""What may stand in the place of a matrix among the parameters: quantized weights, adapters.

The model asks three things of a matrix. An array answers them by a plain product; an object with
these methods answers them its own way, and must be a pytree, so that it passes through jit.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int


@runtime_checkable
class Kernel(Protocol):
    """A matrix that is not a plain array; axes as those of the array it stands for."""

    def contract(self, x: Array, n: int, preferred_element_type: Any = None) -> Array:
        """The last n axes of x with the first n of the kernel; the type of x, or the one asked."""
        ...

    def contract_last(self, x: Float[Array, "... E"]) -> Float[Array, "... V"]:
        """The last axis of x with the last of a kernel [V, E], in float32."""
        ...

    def rows(self, ids: Int[Array, "..."]) -> Float[Array, "... E"]:
        """Rows of a kernel [V, E], in the type the model computes in."""
        ...
