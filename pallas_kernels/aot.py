"""Compiles every kernel, at every shape of its table, for a GPU that need not be there.

    python -m alaya_jax.pallas_kernels.aot [--json] [--only NAME] [--target h100] [--jobs 2]

Prints registers, spills and shared memory from the assembler's report, how many blocks a
multiprocessor holds, and the roofline. Fails if a kernel spills, uses local memory, needs more
shared memory than there is, or lacks the wgmma or TMA instructions that its case claims. It needs
the packages of constraints/cuda.txt but no GPU; times are predictions from public peak rates.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import pkgutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from alaya_jax import pallas_kernels
from alaya_jax.pallas_kernels import targets
from alaya_jax.pallas_kernels.compile_case import DEVICES, CompileCase, Device
from alaya_jax.pallas_kernels.ptxas_report import KernelReport, read_reports


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The outcome of one case.

    Attributes:
      case: name of the case.
      kernels: reports of its kernels, in no particular order; empty if compilation failed.
      faults: what is wrong; empty if nothing is.
      seconds: time to trace and compile.
      roofline_us: predicted time at the device's peak rates, in microseconds.
    """

    case: str
    kernels: list[KernelReport]
    faults: list[str]
    seconds: float
    roofline_us: float


def all_cases() -> list[CompileCase]:
    """The cases of every operation, from `cases()` of its `compile_cases` module."""
    found = []
    for package in pkgutil.iter_modules(pallas_kernels.__path__):
        name = f"{pallas_kernels.__name__}.{package.name}.compile_cases"
        if package.ispkg and importlib.util.find_spec(name) is not None:
            found.extend(importlib.import_module(name).cases())
    return found


def compile_case(case: CompileCase, mesh: Any, device: Device) -> Compiled:
    """Compiles one case for one device of a mesh that exists on paper, and reads the reports."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    here = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), case.arguments
    )
    started = time.perf_counter()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            with _quiet_stderr(), jax.set_mesh(mesh):
                jax.jit(case.call).lower(*arguments).compile()
        except Exception as e:  # any error counts against this case alone
            said = (str(e).strip() or repr(e)).splitlines()[0]
            faults.append(f"does not compile: {said[:300]}")
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        kernels = read_reports(Path(folder))
    names = {kernel.name for kernel in kernels}
    faults += [f"has no kernel {name}" for name in case.kernels if not faults and name not in names]
    for kernel in kernels:
        faults += kernel.faults(case.claims if kernel.name == case.kernels[0] else frozenset())
        if kernel.blocks_a_core(device) < 1:
            faults.append(f"{kernel.name} does not fit a multiprocessor")
    return Compiled(
        case.name,
        kernels,
        faults,
        time.perf_counter() - started,
        device.seconds(case.work) * 1e6,
    )


def compile_named(name: str, target: str) -> Compiled:
    """`compile_case` in a worker process: cases cannot be pickled, but their names can."""
    targets.prepare()
    (case,) = [case for case in all_cases() if case.name == name and target in case.targets]
    return compile_case(case, targets.mesh(target, x=1), DEVICES[target])


class _quiet_stderr:
    """Silences what C++ code writes to stderr: the dump warns that it has no disassembler."""

    def __enter__(self) -> None:
        sys.stderr.flush()
        self._saved = os.dup(2)
        self._null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(self._null, 2)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
        os.close(self._null)


HEAD = "registers  spill    SMEM blocks/SM   grid  wgmma  TMA"


def lines(result: Compiled, device: Device) -> list[str]:
    """The report of one case as text."""
    told = [f"{result.case}   (roofline {result.roofline_us:.1f} us, predicted)"]
    for k in result.kernels:
        told.append(
            f"  {k.name:24} {k.registers:9} {k.spill_bytes:6} {k.shared_memory:7} "
            f"{k.blocks_a_core(device):9} {k.grid:6} {k.wgmma:6} {k.tma:4}"
        )
    return told + [f"  FAULT {fault}" for fault in result.faults]


def main() -> int:
    """Compiles the table and returns the exit code: 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="alaya_jax.pallas_kernels.aot", description=__doc__)
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--target", default="h100", choices=targets.NAMES)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    options = parser.parse_args()
    targets.prepare()
    targets.mesh(options.target, x=1)  # a missing package raises here, once
    device = DEVICES[options.target]
    cases = [case for case in all_cases() if options.only in case.name]
    names = [case.name for case in cases if options.target in case.targets]
    if not options.json:
        print(f"compiled for {options.target}, no GPU used\n  {'kernel':24} {HEAD}")
    bad = 0
    context = multiprocessing.get_context("spawn")  # a fork would lose the threads of JAX
    with concurrent.futures.ProcessPoolExecutor(options.jobs, context) as pool:
        one = functools.partial(compile_named, target=options.target)
        for result in pool.map(one, names):
            bad += bool(result.faults)
            if options.json:
                print(json.dumps(dataclasses.asdict(result)), flush=True)
            else:
                print("\n".join(lines(result, device)), flush=True)
    if not options.json:
        print(f"{len(names)} cases, {bad} with faults")
    if not names:
        print(f"no kernel is made for {options.target}; XLA runs there", file=sys.stderr)
    return 1 if bad or not names else 0


if __name__ == "__main__":
    sys.exit(main())
