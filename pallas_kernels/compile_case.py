"""What `aot` compiles: an operation's call at one shape, the claims about it, its roofline."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Work:
    """The least work that a call has to do.

    Attributes:
      bytes: read from or written to device memory, each counted once.
      flops: of its matmuls, without those of padding.
    """

    bytes: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Device:
    """Public peak rates and sizes of a device, from which predictions are made.

    Attributes:
      bandwidth: of device memory, in bytes per second.
      matmul: dense bf16 FLOP per second.
      cores: number of multiprocessors.
      registers, shared_memory, threads, blocks: how many (bytes, for memory) one of them holds.
    """

    bandwidth: float
    matmul: float
    cores: int
    registers: int = 65536
    shared_memory: int = 233472
    threads: int = 2048
    blocks: int = 32

    def seconds(self, work: Work) -> float:
        """The roofline: the time that memory or matmuls take at peak rates, whichever is longer."""
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
      name: the operation and the shape, for people.
      call: the function to jit. It names the implementation, so no other one can take its place.
      arguments: pytree of `jax.ShapeDtypeStruct`, the positional arguments of `call`.
      kernels: names of the Mosaic kernels that it must contain.
      claims: which of "wgmma", "tma" and "fences" the first kernel must contain.
      work: the least work, for the roofline.
      targets: names of the devices that the kernel is written for.
    """

    name: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernels: tuple[str, ...]
    claims: frozenset[str]
    work: Work
    targets: tuple[str, ...] = ("h100",)
