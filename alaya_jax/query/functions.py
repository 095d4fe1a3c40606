"""Functions that a user gives in a query: what they are called with, and what they are called."""

import functools
import hashlib
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from alaya_jax.errors import RequestError

OPTIONAL = ("window_best", "window_lse")
"""Arguments that a `Custom` selection gets where it has parameters of these names."""


def optional_arguments(select: Callable[..., Any]) -> tuple[str, ...]:
    """Those of `OPTIONAL` that a function takes beside its first two arguments.

    Raises:
      RequestError: it cannot be called so.
    """
    try:
        parameters = inspect.signature(select).parameters
    except (TypeError, ValueError):  # of some callables nothing is known
        return ()
    asked = tuple(name for name in OPTIONAL if name in parameters)
    try:
        inspect.signature(select).bind(None, None, **dict.fromkeys(asked))
    except TypeError as error:
        raise RequestError(
            f"Custom({getattr(select, '__name__', select)}): it is called with (scores, "
            f"positions), and by name with those of {', '.join(OPTIONAL)} that it has; {error}"
        ) from error
    return asked


def function_name(function: Callable[..., Any]) -> str:
    """Name and digest of a function: another digest for other code, defaults, enclosed values, or
    functions and numbers of its module that it refers to.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    digest = hashlib.sha256(_said(function, ()).encode()).hexdigest()
    return f"{name.removeprefix('<lambda>') or 'lambda'}#{digest[:8]}"


def _said(value: Any, above: tuple[int, ...]) -> str:
    """What a value is, in words that are the same in the next process where that can be."""
    if id(value) in above:
        return "itself"
    above = (*above, id(value))
    if isinstance(value, int | float | complex | str | bytes | bool | None):
        return repr(value)
    if isinstance(value, tuple | list | set | frozenset):
        each = [_said(x, above) for x in value]
        ordered = sorted(each) if isinstance(value, set | frozenset) else each
        return f"{type(value).__name__}({', '.join(ordered)})"
    if isinstance(value, dict):
        return str([(_said(key, above), _said(x, above)) for key, x in value.items()])
    if isinstance(value, np.ndarray | jax.Array) and not isinstance(value, Tracer):
        array = np.asarray(value)
        data = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return f"array {array.shape} {array.dtype} {data}"
    if isinstance(value, functools.partial):
        return f"partial {_said((value.func, value.args, value.keywords), above)}"
    if isinstance(value, types.CodeType):
        return _said((value.co_code, value.co_names, value.co_consts), above)
    if isinstance(value, types.FunctionType):
        return _function(value, above)
    if isinstance(value, types.MethodType):
        return f"method {_said((value.__func__, value.__self__), above)}"
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType | type):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"
    inner = getattr(value, "__wrapped__", None)  # of jit and its like
    if inner is not None:
        return f"wrapped {_said(inner, above)}"
    if type(value).__call__ is not object and hasattr(value, "__dict__"):
        kind = type(value)
        return f"{kind.__module__}.{kind.__qualname__} {_said(vars(value), above)}"
    return f"{type(value).__qualname__} {id(value)}"


def _function(function: types.FunctionType, above: tuple[int, ...]) -> str:
    enclosed = []
    for cell in function.__closure__ or ():
        try:
            enclosed.append(cell.cell_contents)
        except ValueError:  # not there yet
            enclosed.append(None)
    names = _names(function.__code__)
    about = {name: function.__globals__[name] for name in names if name in function.__globals__}
    # Of other modules their names suffice: a version of a library is not the user's function.
    parts = (
        function.__code__,
        function.__defaults__,
        function.__kwdefaults__,
        enclosed,
        about if not (function.__module__ or "").startswith(("jax.", "numpy.")) else {},
    )
    return f"function {_said(parts, above)}"


def _names(code: types.CodeType) -> list[str]:
    """Names that code looks up outside itself, in it and in functions written inside it."""
    inside = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return sorted({*code.co_names, *(name for c in inside for name in _names(c))})
