"""The library on a GPU: what is right, how fast it is, beside the alternatives.

    python3 benchmarks/gpu_kernels.py check           # kernels and plans against references
    python3 benchmarks/gpu_kernels.py rates table     # copies, matmuls; each kernel's times
    python3 benchmarks/gpu_kernels.py sweep           # the same with other tunings
    python3 benchmarks/gpu_kernels.py model session copies    # Llama-3-8B's shape; host and device
    python3 benchmarks/gpu_kernels.py --rehearse check rates table model session copies    # no GPU

Each job is a process of its own with a time limit, so that one that fails, hangs or crashes stops
no other; what a job finds is written as it comes. Checks run side by side, timings one by one.
Needs jax with CUDA and the packages that are there; installs nothing.

A row is a JSON line in benchmarks/results/gpu_kernels.jsonl (`--out` names another folder), with
device and versions. Jobs that the time does not reach are named. Exits with 1 if anything failed.
`--rehearse` runs all of it on the CPU with toy shapes, kernels simulated: no number of it means
anything, but no second on a device is lost to a typo.

Every row of a kernel carries a prediction: the roofline at the card's public peak rates. What is
predicted is called predicted; what is called kernel_us or wall_us was measured.
"""

import argparse
import concurrent.futures
import dataclasses
import faulthandler
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("check", "rates", "table", "sweep", "model", "session", "copies")
LIMITS = {
    "check": 90,
    "rates": 60,
    "table": 75,
    "sweep": 75,
    "model": 240,
    "session": 240,
    "copies": 60,
}
MARK = "RESULT "  # begins a line of a job's output that is a row


@dataclasses.dataclass(frozen=True)
class Job:
    """One process: a part, and which of its cases."""

    part: str
    op: str
    number: int
    label: str


def limit(job: Job, rehearse: bool) -> float:
    """Seconds that a job may take; a simulation takes longer."""
    return LIMITS[job.part] * (4 if rehearse else 1)


def find_the_library() -> None:
    """Makes `import alaya_jax` work from a checkout that nobody installed."""
    if str(ROOT) in sys.path:
        return
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import alaya_jax

    if str(ROOT) not in alaya_jax.__path__:
        alaya_jax.__path__.append(str(ROOT))  # models/, pallas_kernels/ and configs/ are there
    try:
        import jaxtyping  # noqa: F401
    except ImportError:  # annotations only: anything that can be subscripted will do
        stub: Any = types.ModuleType("jaxtyping")
        stub.__getattr__ = lambda name: type(name, (), {"__class_getitem__": lambda cls, _: cls})
        sys.modules["jaxtyping"] = stub


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=4.0, help="start no job after these")
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    parser.add_argument("--rows", type=int, default=99, help="of each operation's table, at most")
    parser.add_argument("--workers", type=int, default=8, help="checks at a time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rehearse", action="store_true", help="toy shapes on the CPU")
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rehearse:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if args.job is not None:
        return run_here(args)
    started = time.monotonic()
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process only lists the jobs
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    lock = threading.Lock()

    def run(numbered: tuple[int, Job]) -> None:
        number, job = numbered
        if time.monotonic() - started > 60 * args.minutes:
            with lock:
                print(f"not reached within {args.minutes} minutes: {job.label}", flush=True)
            return
        begun = time.monotonic()
        rows, fault, log = run_apart(number, args, environment, limit(job, args.rehearse))
        with lock:
            (args.out / "gpu_kernels.log").open("a").write(f"== {job.label}\n{log}\n")
            if not args.rehearse:
                with (args.out / "gpu_kernels.jsonl").open("a") as f:
                    f.writelines(json.dumps(row) + "\n" for row in rows)
            state = "ok  " if fault is None else "FAIL"
            print(f"{state} {time.monotonic() - begun:5.1f} s  {job.label}", flush=True)
            for row in rows:
                print("".join(f"       {line}\n" for line in told(row)), end="", flush=True)
            if fault is not None:
                failed.append(job)
                print(f"       {fault}", flush=True)

    numbered = list(enumerate(jobs(args)))
    side_by_side = [x for x in numbered if x[1].part == "check"]
    with concurrent.futures.ThreadPoolExecutor(args.workers) as workers:
        list(workers.map(run, side_by_side))
    for x in numbered:
        if x[1].part != "check":
            run(x)
    for job in failed:
        print(f"failed: {job.label}")
    print(f"{len(failed)} of {len(numbered)} jobs failed, {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


def operations() -> dict[str, Any]:
    """The modules of benchmarks/gpu/ops, by the name of their operation."""
    find_the_library()
    import importlib

    names = sorted(p.stem for p in (ROOT / "benchmarks" / "gpu" / "ops").glob("*.py"))
    modules = [importlib.import_module(f"gpu.ops.{name}") for name in names]
    return {module.OP: module for module in modules}


def jobs(args: argparse.Namespace) -> list[Job]:
    """All jobs of the parts asked for, in the order of the parts. The same in every process."""
    find_the_library()
    from gpu import copies, model

    ops = operations() if {"check", "table", "sweep"} & set(args.parts) else {}
    found = []
    for part in args.parts:
        if part == "check":
            for op, module in ops.items():
                names = [name for name, _ in module.checks(None, args.rehearse)]
                found += [Job(part, op, n, f"check {name}") for n, name in enumerate(names)]
        elif part in ("table", "sweep"):
            for op, module in ops.items():
                rows = list(module.rows(args.rehearse, part == "sweep"))[: args.rows]
                for n, (described, *_) in enumerate(rows):
                    label = ", ".join(f"{k} {v}" for k, v in described.items())
                    found.append(Job(part, op, n, f"{part} {label}"))
        elif part == "rates":
            found.append(Job(part, part, 0, part))
        else:
            names = {"model": model.CASES, "session": model.SESSIONS, "copies": copies.CASES}[part]
            found += [Job(part, part, n, f"{part} {name}") for n, name in enumerate(names)]
    return [job for job in found if args.only in job.label]


def run_apart(
    number: int, args: argparse.Namespace, environment: dict[str, str], limit: float
) -> tuple[list[dict], str | None, str]:
    """Rows of a job, what is wrong with it or None, and all that it printed."""
    command = [sys.executable, __file__, *args.parts, "--job", str(number), "--only", args.only]
    command += ["--rows", str(args.rows)] + ["--rehearse"] * args.rehearse
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        errors="replace",
    ) as child:  # fmt: skip
        timer = threading.Timer(limit, child.kill)
        timer.start()
        text = child.communicate()[0]
        timer.cancel()
    lines = text.splitlines()
    rows = [json.loads(x.removeprefix(MARK)) for x in lines if x.startswith(MARK)]
    log = "\n".join(x for x in lines if not x.startswith(MARK))
    if child.returncode == 0:
        return rows, next((row["wrong"] for row in rows if row.get("wrong")), None), log
    end = " | ".join(log.splitlines()[-4:])[-700:]
    why = f"killed after {limit} s" if child.returncode == -9 else f"exit {child.returncode}"
    return rows, f"{why}: {end}", log


def run_here(args: argparse.Namespace) -> int:
    """Runs one job in this process; prints its rows."""
    find_the_library()
    job = jobs(args)[args.job]
    # A job that is killed has said where it was.
    faulthandler.dump_traceback_later(0.9 * limit(job, args.rehearse))
    import jax
    import machine

    from alaya_jax.pallas_kernels import dispatch

    device = jax.devices()[0]
    if device.platform != "gpu" and not args.rehearse:
        print("no GPU here; --rehearse runs all of it on the CPU", file=sys.stderr)
        return 2
    target = dispatch.INTERPRET if args.rehearse else None

    def say(**row: Any) -> None:
        common = {
            "benchmark": "gpu_kernels",
            "part": job.part,
            "device": device.device_kind,
            "driver": driver(),
            **machine.facts("jax", "jaxlib"),
        }
        print(MARK + json.dumps({**common, **row}), flush=True)

    if job.part == "check":
        fault = list(operations()[job.op].checks(target, args.rehearse))[job.number][1]()
        say(op=job.op, case=job.label, wrong=fault)
    elif job.part == "rates":
        from gpu import timing

        small = args.rehearse
        bandwidth, rate = timing.copy_bandwidth(8 if small else 2048), timing.matmul_rate(
            256 if small else 8192
        )  # fmt: skip
        say(copy_bytes_per_s=bandwidth, matmul_flops_per_s=rate)
    elif job.part in ("table", "sweep"):
        row = list(operations()[job.op].rows(args.rehearse, job.part == "sweep"))[job.number]
        time_row(operations()[job.op], *row, say)
    else:
        from gpu import copies, model

        run = {"model": model.run, "session": model.run_session, "copies": copies.run}[job.part]
        run(job.number, args.rehearse, say)
    return 0


def driver() -> str | None:
    """The GPU driver's version."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def time_row(
    op: Any, described: dict, moved: float, flops: float, make: Any, say: Any
) -> None:  # fmt: skip
    """Times the calls of a row; each of ours is compared with XLA's result first."""
    import jax
    from gpu import timing

    from alaya_jax.pallas_kernels.compile_case import DEVICES, Work

    kind = "h200" if "H200" in jax.devices()[0].device_kind else "h100"
    predicted = DEVICES[kind].seconds(Work(moved, flops)) * 1e6
    row: dict[str, Any] = {**described, "bytes": moved, "flops": flops}
    row["predicted_roofline_us"] = round(predicted, 2)
    expected = wrong = None
    calls = make()
    for name in sorted(calls, key=lambda name: name != "xla"):
        call, inputs = calls[name]
        try:
            result = call(*inputs[0])
            if name == "xla":
                expected = result
            elif name.startswith("mosaic_gpu") and expected is not None:
                error = op.difference(result, expected)
                if not error < op.TOLERANCE:
                    wrong = f"{name} differs from XLA by {error}, not timed"
                    row[name] = {"failed": wrong}
                    continue
            row[name] = timing.measure(call, inputs)
            if hasattr(op, "facts"):
                row[name] |= op.facts(result)
        except Exception as e:  # an alternative may not run this shape: the row says so
            row[name] = {"failed": (str(e).strip() or repr(e)).splitlines()[0][:300]}
            if name.startswith("mosaic_gpu"):
                wrong = f"{name}: {row[name]['failed']}"
    row.update(op.torch_rows(described))
    say(**row, wrong=wrong)


def told(row: dict) -> list[str]:
    """What a person wants to see of a row, a line for each thing."""
    if row["part"] == "check":
        return []
    lines = [row["what"]] if "what" in row else []
    for name, value in row.items():
        if isinstance(value, dict) and "failed" in value:
            lines.append(f"{name}: failed: {value['failed']}")
        elif isinstance(value, dict) and "wall_us" in value:
            rest = "".join(f", {k} {v}" for k, v in value.items() if not k.endswith("_us"))
            us = value["kernel_us"] or value["wall_us"]
            rates = ""
            if "bytes" in row:
                rates = (
                    f" ({row['bytes'] / us / 1e3:,.0f} GB/s, {row['flops'] / us / 1e6:,.1f} TF/s)"
                )
            lines.append(
                f"{name}: kernels {value['kernel_us']} us, wall {value['wall_us']} us{rates}{rest}"
            )
        elif name.endswith(("_us", "_per_s", "_ms", "_s", "share", "error")) or name == "case":
            lines.append(
                f"{name}: {value:,.4g}" if isinstance(value, float) else f"{name}: {value}"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
