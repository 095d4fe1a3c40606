"""Products with a matrix among the parameters, and what may stand in a matrix's place there:
quantized weights, adapters.

The model asks three things of a matrix. An array answers them by a plain product; an object with
these methods answers them its own way, and must be a pytree, so that it passes through jit.
"""

import functools
import math
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
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


def contract(x: Array, matrix: "Array | Matrix", n: int, preferred: Any = None) -> Array:
    """Contracts the last n axes of x with the first n of a matrix, in x's type or the one asked
    for.
    """
    if isinstance(matrix, Matrix):
        return matrix.contract(x, n, preferred)
    plain = functools.partial(jnp.tensordot, axes=n, preferred_element_type=preferred)
    if matrix.dtype.itemsize != 2:
        return plain(x, matrix)
    kind = preferred or jnp.promote_types(x.dtype, matrix.dtype)
    on_cpu = functools.partial(_of_halves, n=n, kind=kind)
    return lax.platform_dependent(x, matrix, cpu=on_cpu, default=plain)


def contract_last(x: Float[Array, "... E"], matrix: "Array | Matrix") -> Float[Array, "... V"]:
    """Contracts the last axis of x with the last of a matrix [V, E], in float32."""
    if isinstance(matrix, Matrix):
        return matrix.contract_last(x)

    def product(x: Array, matrix: Array) -> Array:
        return jnp.einsum("...e,ve->...v", x, matrix, preferred_element_type=jnp.float32)

    def twice(x: Array, matrix: Array) -> Array:
        rows = jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1]))
        return product(rows, matrix)[0].reshape(*x.shape[:-1], -1)

    if matrix.dtype.itemsize != 2 or math.prod(x.shape[:-1]) != 1:
        return product(x, matrix)
    # A single row of 16 bits XLA multiplies ten times slower on a CPU than two of them.
    return lax.platform_dependent(x, matrix, cpu=twice, default=product)


FEW = 8
"""Rows up to which weights of 16 bits are converted as they are multiplied; more rows reuse what is
converted before."""
_SUMMED = 8
"""Terms of a sum then: rows of a matrix 4,096 bytes apart share 8 places in a CPU's cache."""


def _of_halves(x: Array, matrix: Array, n: int, kind: Any) -> Array:
    """`contract` on a CPU, in float32: XLA multiplies 16 bits several times slower there."""
    inputs, outputs = matrix.shape[:n], matrix.shape[n:]
    lead = x.shape[: x.ndim - n]
    length, rows = math.prod(inputs), math.prod(lead)
    wide = x.astype(jnp.float32)
    if rows > FEW or length % _SUMMED:
        return jnp.tensordot(wide, matrix.astype(jnp.float32), n).astype(kind)
    some = wide.reshape(rows, -1, _SUMMED, 1)
    weights = matrix.reshape(1, -1, _SUMMED, math.prod(outputs))
    # Term by term: as a sum XLA would give it to a library, which converts the matrix as a whole.
    terms = (some[:, :, i] * weights[:, :, i].astype(jnp.float32) for i in range(_SUMMED))
    # Kept, or XLA would store the terms of one long sum.
    sums = lax.optimization_barrier(functools.reduce(jnp.add, terms))
    return summed(sums).reshape(*lead, *outputs).astype(kind)


def summed(x: Float[Array, "R G N"]) -> Float[Array, "R N"]:
    """Over G, up to 32 at a time: XLA on CPUs stores the terms of a longer sum before it adds."""
    groups = x.shape[1]
    few = max(n for n in range(1, min(groups, 32) + 1) if groups % n == 0)
    return jnp.sum(jnp.sum(x.reshape(x.shape[0], -1, few, x.shape[2]), axis=2), axis=1)


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
