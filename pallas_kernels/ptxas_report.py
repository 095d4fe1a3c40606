"""Reads what the Mosaic GPU compiler dumps: registers, spills, shared memory, PTX."""

import dataclasses
import re
from pathlib import Path

from alaya_jax.errors import KernelError
from alaya_jax.pallas_kernels.compile_case import Device


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One compiled kernel.

    Attributes:
      name: name of the kernel.
      registers: per thread.
      spill_bytes: bytes stored and loaded because registers ran out.
      stack_bytes: local memory per thread, in bytes.
      shared_memory: bytes per block.
      threads: per block.
      grid: number of blocks.
      wgmma, tma: how many of these instructions the PTX has.
      fences: how many fences it has that make what threads write to shared memory visible to wgmma
        and TMA.
    """

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_memory: int
    threads: int
    grid: int
    wgmma: int
    tma: int
    fences: int

    def blocks_a_core(self, device: Device) -> int:
        """Occupancy: how many blocks a multiprocessor holds at once."""
        # Warps get registers in units of 256; the system takes 1 KB of shared memory per block.
        warp = -(-self.registers * 32 // 256) * 256
        return min(
            device.registers // (warp * (self.threads // 32)),
            device.shared_memory // (self.shared_memory + 1024),
            device.threads // self.threads,
            device.blocks,
        )

    def faults(self, claims: frozenset[str]) -> list[str]:
        """What is wrong with the kernel; empty if nothing is."""
        found = []
        if self.spill_bytes:
            found.append(f"{self.name} spills {self.spill_bytes} bytes of registers")
        if self.stack_bytes:
            found.append(f"{self.name} keeps {self.stack_bytes} bytes in local memory")
        for claim in sorted(claims):
            if not getattr(self, claim):
                found.append(f"{self.name} has no {claim} instruction")
        return found


def read_reports(folder: Path) -> list[KernelReport]:
    """The kernels that were dumped into a folder (`MOSAIC_GPU_DUMP_TO`)."""
    return [_read(path) for path in sorted(folder.glob("*.ptxas"))]


def _read(path: Path) -> KernelReport:
    ptxas = path.read_text()
    ptx = path.with_suffix(".ptx").read_text()
    module = path.with_suffix(".before_layout_inference.txt").read_text()

    def number(pattern: str, text: str = ptxas) -> int:
        found = re.findall(pattern, text)
        if not found:
            raise KernelError(f"no {pattern!r} in the compiler's report {path}; its form changed?")
        return sum(int(x) for x in found)

    launch = re.search(r"gpu\.launch .*?dynamic_shared_memory_size %(\S+)", module)
    if launch is None:
        raise KernelError(f"no launch in the compiler's dump beside {path}; its form changed?")

    def constant(name: str) -> int:
        return number(rf"%{re.escape(name)} = arith\.constant (\d+) :", module)

    sizes = re.findall(r"in \((.*?)\)", launch.group(0))
    blocks, threads = (
        [constant(x) for x in re.findall(r"= %(\w+)", dimensions)] for dimensions in sizes[-2:]
    )
    return KernelReport(
        name=re.sub(r"_\d+$", "", path.stem),
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill"),
        stack_bytes=number(r"(\d+) bytes stack"),
        shared_memory=constant(launch.group(1)),
        threads=threads[0] * threads[1] * threads[2],
        grid=blocks[0] * blocks[1] * blocks[2],
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        fences=len(re.findall(r"fence\.proxy\.async", ptx)),
    )
