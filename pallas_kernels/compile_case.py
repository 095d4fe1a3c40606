"""What `aot` compiles: a call of an operation at one shape, what is claimed of it, its roofline."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call must do at least.

    Attributes:
      bytes: read from and written to device memory, each once.
      flops: of its matmuls, those of padding left out.
    """

    bytes: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Device:
    """Public peak rates and sizes of a device; what a prediction is made from.

    Attributes:
      bandwidth: bytes a second of device memory.
      matmul: bf16 FLOP a second, dense.
      cores, registers, shared_memory, threads, blocks: multiprocessors, and what one holds.
    """

    bandwidth: float
    matmul: float
    cores: int
    registers: int = 65536
    shared_memory: int = 233472
    threads: int = 2048
    blocks: int = 32

    def seconds(self, work: Work) -> float:
        """The roofline: time of the slower of memory and matmuls, at peak rates."""
        return max(work.bytes / self.bandwidth, work.flops / self.matmul)


DEVICES = {
    "h100": Device(bandwidth=3.35e12, matmul=989e12, cores=132),
    "h200": Device(bandwidth=4.8e12, matmul=989e12, cores=132),
    "b200": Device(bandwidth=8.0e12, matmul=2250e12, cores=148),
}


@dataclasses.dataclass(frozen=True)
class CompileCase:
    """One call to compile.

    Attributes:
      name: operation and shape, for people.
      call: function of arrays, to be jitted; it names the implementation, so that another one
        cannot step in.
      arguments: pytree of `jax.ShapeDtypeStruct`, positional arguments of `call`.
      kernels: names of the Mosaic kernels it must contain.
      claims: of "wgmma", "tma" and "fences", what the first of the kernels must contain.
      work: for the roofline.
      targets: names of the devices that the kernel is made for.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernels: tuple[str, ...]
    claims: frozenset[str]
    work: Work
    targets: tuple[str, ...] = ("h100",)
