"""What may stand in the place of a matrix among the parameters: quantized weights, adapters.

The model asks three things of a matrix. An array answers them by a plain product; an object with
these methods answers them its own way, and must be a pytree, so that it passes through jit.
"""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


@runtime_checkable
class Matrix(Protocol):
    """A matrix that is not a plain array; axes as those of the array it stands for."""

    def contract(self, x: Array, n: int, preferred_element_type: Any = None) -> Array:
        """Contracts the last n axes of x with the first n of the matrix, in x's type or the one
        asked for.
        """
        ...

    def contract_last(self, x: Float[Array, "... E"]) -> Float[Array, "... V"]:
        """Contracts the last axis of x with the last of a matrix [V, E], in float32."""
        ...

    def rows(self, ids: Int[Array, "..."]) -> Float[Array, "... E"]:
        """Rows of a matrix [V, E], in the type the model computes in."""
        ...


def take_rows(table: Shaped[Array, "V ..."], ids: Int[Array, "..."]) -> Array:
    """Rows of a table by id; where a mesh splits the table along V, only rows travel."""
    rows = jnp.take(table, at_least_two(ids), axis=0)[: ids.size]
    return rows.reshape(*ids.shape, *table.shape[1:])


def at_least_two(ids: Int[Array, "..."]) -> Int[Array, " n"]:
    """The ids in a row; a single one twice, so that of a table that a mesh splits only rows travel.

    With a split table each device takes the rows that it holds, and zeros for the others, and the
    devices sum: that is how the partitioner answers a gather. But on GPUs a gather of a single row
    is first rewritten as a slice, and for a slice whose place is not known before run time the
    whole table is sent around.
    """
    return jnp.broadcast_to(ids.reshape(1), 2) if ids.size == 1 else ids.reshape(-1)
