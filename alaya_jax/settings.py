"""JAX's settings that change what an expression means: ours are the same whatever the user's are.

With `jax_enable_x64` a sum of int32 is an int64; with strict promotion an int32 times a float32 is
an error; with the transfer guard a number of the host may not meet an array of a device; under
`jax_debug_nans` a NaN that says "not known" is one too many. Programs traced under such a setting
would be others than those that are tested. So what the library offers runs under its own, and the
user's hold again when it returns.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax

_ALLOWED = (None, "allow")
_WAYS = ("host_to_device", "device_to_device", "device_to_host")


@contextmanager
def own_settings() -> Iterator[None]:
    """The settings that everything here is written for."""
    config: Any = jax.config
    if (
        not config.jax_enable_x64
        and config.jax_numpy_dtype_promotion == "standard"
        and config.jax_numpy_rank_promotion == "allow"
        and not config.jax_debug_nans
        and all(getattr(config, f"jax_transfer_guard_{way}") in _ALLOWED for way in _WAYS)
    ):
        yield  # as they are by default, or held already: to enter them takes time
        return
    with ExitStack() as held:
        for setting in (
            jax.enable_x64(False),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.transfer_guard("allow"),
            jax.debug_nans(False),
        ):
            held.enter_context(setting)
        yield


def under_own_settings[F: Callable[..., Any]](function: F) -> F:
    """The function, run under `own_settings`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with own_settings():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def for_other_threads[**P, T](function: Callable[P, T]) -> Callable[P, T]:
    """The function, for whichever thread: under `own_settings`, and with this thread's default
    device. What `jax.default_device` and its like set holds for one thread.
    """
    device = jax.config.jax_default_device  # type: ignore[attr-defined]

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with own_settings(), jax.default_device(device):
            return function(*args, **kwargs)

    return run


def methods_under_own_settings[C: type](cls: C) -> C:
    """The class, with every public method, `__init__` and `__next__` run under `own_settings`."""
    for name, method in list(vars(cls).items()):
        ours = not name.startswith("_") or name in ("__init__", "__next__")
        if ours and inspect.isfunction(method) and not inspect.isgeneratorfunction(method):
            setattr(cls, name, under_own_settings(method))
    return cls
