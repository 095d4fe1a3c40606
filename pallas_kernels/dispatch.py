"""Which implementation of an operation runs, and why not the others.

An operation is a list of candidates, fastest first. Given a request (shapes, dtypes, target), each
says whether it can run it, and if not, why. The first that can is chosen, unless the caller names
one. Nothing falls back in silence: `Op.choose` returns the choice and the reason against each
faster candidate without running anything, and if none can run, one error lists every reason.

Only shapes are needed, so choosing works while JAX traces: under jit, inside shard_map, and when
compiling ahead of time for a device that is not there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from alaya_jax.errors import KernelError

IMPLEMENTATIONS = ("mosaic_gpu", "xla", "reference")
"""All names of implementations. An operation need not have every one."""

_CAPABILITIES = {
    "B300": (10, 3),
    "B200": (10, 0),
    "H200": (9, 0),
    "H100": (9, 0),
    "H800": (9, 0),
    "H20": (9, 0),
    "GH200": (9, 0),
    "L40": (8, 9),
    "A100": (8, 0),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that a program is traced for.

    Attributes:
      platform: JAX's name of it: "cpu", "gpu" or "tpu".
      capability: compute capability of a GPU, (9, 0) for Hopper; None if unknown.
      interpret: simulate Mosaic GPU kernels on the CPU, with race detection. This is for proving
        them correct; it is far too slow to use.
    """

    platform: str
    capability: tuple[int, int] | None = None
    interpret: bool = False

    def __str__(self) -> str:
        if self.interpret:
            return "interpreter"
        if self.capability is None:
            return self.platform
        return f"{self.platform} sm_{self.capability[0]}{self.capability[1]}"


CPU = Target("cpu")
H100 = Target("gpu", (9, 0))
B200 = Target("gpu", (10, 0))
INTERPRET = Target("cpu", interpret=True)


def current_target() -> Target:
    """The device of the current mesh (`jax.set_mesh`, shard_map), or of the default backend.

    JAX keys its cache of traced programs by both, so a program that was traced for one target is
    not reused for another.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return _target_of(device.platform, device.device_kind)
    default = jax.config.jax_default_device
    if isinstance(default, str):
        return _target_of(default, "")
    if default is None:
        default = jax.devices()[0]
    return target_of(default)


def target_of(where: Any) -> Target:
    """The target that a `jax.Device` is, or the devices of a mesh; of None, the current one."""
    if where is None:
        return current_target()
    device = where.devices.flat[0] if isinstance(where, jax.sharding.Mesh) else where
    return _target_of(device.platform, device.device_kind)


def _target_of(platform: str, kind: str) -> Target:
    if platform in ("cuda", "gpu"):
        names = (name for name in _CAPABILITIES if name in kind.replace(" ", ""))
        return Target("gpu", _CAPABILITIES.get(max(names, key=len, default="")))
    return Target(platform)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation of an operation.

    Attributes:
      name: one of `IMPLEMENTATIONS`.
      unfit: a function `(target, *args, **kwargs)` that returns why it cannot run the call, or
        None if it can. It looks only at shapes, dtypes and static arguments. None: it can run
        every call.
      run: the function. It takes the arguments of the operation, and `target=` if `wants_target`.
      automatic: whether it may be chosen without being named.
      wants_target: whether `run` takes the target.
    """

    name: str
    unfit: Callable[..., str | None] | None
    run: Callable[..., Any]
    automatic: bool = True
    wants_target: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that runs, and why no faster one does.

    Attributes:
      op: name of the operation.
      implementation: name of the chosen candidate.
      target: the device that it was chosen for.
      passed_over: (name, reason) of each faster candidate.
    """

    op: str
    implementation: str
    target: Target
    passed_over: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        why = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over)
        return f"{self.op}: {self.implementation} on {self.target}" + (f" ({why})" if why else "")


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation and its implementations, fastest first."""

    name: str
    candidates: tuple[Candidate, ...]

    def choose(
        self,
        *args: Any,
        implementation: str | None = None,
        target: Target | None = None,
        **kwargs: Any,
    ) -> Choice:
        """The implementation that `run` would use. Arrays may be `jax.ShapeDtypeStruct`s.

        Raises:
          KernelError: the named implementation cannot run, or without a name none can. The message
            has every reason.
        """
        return self._choose(args, kwargs, implementation, target)[1]

    def run(
        self,
        *args: Any,
        implementation: str | None = None,
        target: Target | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the operation.

        Args:
          *args, **kwargs: the arguments of the operation.
          implementation: which one, by name; None: the first that can run.
          target: the device; None: `current_target()`.

        Raises:
          KernelError: as in `choose`.
        """
        candidate, choice = self._choose(args, kwargs, implementation, target)
        if candidate.wants_target:
            kwargs["target"] = choice.target
        with jax.named_scope(f"{self.name}.{candidate.name}"):
            return candidate.run(*args, **kwargs)

    def _choose(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        implementation: str | None,
        target: Target | None,
    ) -> tuple[Candidate, Choice]:
        target = target or current_target()
        named = implementation is not None
        if named and implementation not in IMPLEMENTATIONS:
            raise KernelError(
                f"{self.name}: implementation={implementation!r} is not one of "
                f"{', '.join(IMPLEMENTATIONS)}; None takes the fastest that can run"
            )
        reasons: list[tuple[str, str]] = []
        for candidate in self.candidates:
            if candidate.name != implementation if named else not candidate.automatic:
                continue
            reason = candidate.unfit and candidate.unfit(target, *args, **kwargs)
            if reason is None:
                return candidate, Choice(self.name, candidate.name, target, tuple(reasons))
            reasons.append((candidate.name, reason))
        if not reasons:
            reasons.append((str(implementation), "this operation has no such implementation"))
        others = [c.name for c in self.candidates if c.name not in dict(reasons)]
        lines = "".join(f"\n  {name}: {reason}" for name, reason in reasons)
        way_out = f"; try implementation={' or '.join(map(repr, others))}" if others else ""
        raise KernelError(f"{self.name} cannot run on {target}{way_out}{lines}")


def not_a_hopper(target: Target) -> str | None:
    """Why a kernel that uses TMA and wgmma cannot run on a target; None if it can."""
    if target.interpret:
        return None
    if target.platform != "gpu":
        return f"needs a Hopper GPU (sm_90), the platform is {target.platform}"
    if target.capability is None:
        return "needs a Hopper GPU (sm_90), and the kind of this GPU is unknown; pass target="
    if target.capability[0] != 9:
        major, minor = target.capability
        return f"needs a Hopper GPU (sm_90), this one is sm_{major}{minor}"
    return None
