"""Asking an operation whether it could run, before anything runs."""

from typing import Any

import jax
import jax.numpy as jnp

from alaya_jax.pallas_kernels.dispatch import Choice


def abstract(*shape: int, dtype: Any = jnp.int32) -> Any:
    """The shape and dtype of an array, in place of the array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def passed_over(choice: Choice, implementation: str) -> str | None:
    """Why an operation would not use this implementation; None if it would."""
    if implementation in (choice.implementation, "reference"):
        return None
    reasons = dict(choice.passed_over)
    return f"{choice.op}: {reasons.get(implementation, 'it has no such implementation')}"
