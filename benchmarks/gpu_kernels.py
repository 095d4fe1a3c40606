"""The kernels on a GPU: every case checked, then timed beside the alternatives.

    python3 benchmarks/gpu_kernels.py [--minutes 8] [--only paged_decode]
    python3 benchmarks/gpu_kernels.py --interpret      # no GPU: a few cases, toy shapes, no claims

Needs jax with CUDA and the packages that are there; installs nothing. First the copy bandwidth and
the matmul rate of this very device, in this very run; then each row's time, and the share of those
rates that it reaches. A row is a JSON line in benchmarks/results/gpu_kernels.jsonl, with device and
versions. Rows that the time does not reach are named. Exits with 1 if a case is wrong; nothing is
timed then.

Every row carries a prediction: the roofline at the card's public peak rates. What is predicted is
called predicted; what is called kernel_us or wall_us was measured.
"""

import argparse
import importlib
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_kernels.jsonl"


def find_the_library() -> None:
    """Makes `import alaya_jax` work from a checkout that nobody installed."""
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
    parser.add_argument("--minutes", type=float, default=8.0, help="start no row after these")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--interpret", action="store_true", help="simulate the kernels on a CPU")
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="time other tunings of ours, too")
    args = parser.parse_args()
    started = time.monotonic()
    if args.interpret:
        os.environ["JAX_PLATFORMS"] = "cpu"
    find_the_library()

    import jax
    import machine
    from kernels import timing

    from alaya_jax.pallas_kernels import dispatch
    from alaya_jax.pallas_kernels.compile_case import DEVICES, Work

    device = jax.devices()[0]
    if device.platform != "gpu" and not args.interpret:
        print("no GPU here; --interpret simulates the kernels on the CPU", file=sys.stderr)
        return 2
    target = dispatch.INTERPRET if args.interpret else None
    names = sorted(p.stem for p in (ROOT / "benchmarks" / "kernels").glob("*.py"))
    ops = [importlib.import_module(f"kernels.{n}") for n in names if n != "timing"]
    ops = [op for op in ops if args.only in op.OP]
    traced_for = target or dispatch.current_target()
    print(f"{device.device_kind}, jax {jax.__version__}; target {traced_for}")
    wrong = check_all(ops, target, args.interpret)
    if wrong or args.checks_only:
        print(f"{wrong} cases are wrong; nothing was timed" if wrong else "all cases are right")
        return 1 if wrong else 0

    repeats = 2 if args.interpret else 50
    bandwidth = timing.copy_bandwidth(8 if args.interpret else 2048, repeats)
    rate = timing.matmul_rate(256 if args.interpret else 8192, repeats)
    print(f"measured: copy {bandwidth / 1e9:,.0f} GB/s, bf16 matmul {rate / 1e12:,.1f} TFLOP/s")
    kind = "b200" if "B200" in device.device_kind else "h100"
    common = {
        "benchmark": "gpu_kernels",
        "device": device.device_kind,
        "copy_bytes_per_s": bandwidth,
        "matmul_flops_per_s": rate,
        **machine.facts("jax", "jaxlib"),
    }
    for op in ops:
        for described, moved, flops, make in op.rows(args.interpret, args.sweep):
            label = ", ".join(f"{k} {v}" for k, v in described.items())
            if time.monotonic() - started > 60 * args.minutes:
                print(f"not reached within {args.minutes} minutes: {label}")
                continue
            predicted = DEVICES[kind].seconds(Work(moved, flops)) * 1e6
            row = {**common, **described, "predicted_roofline_us": round(predicted, 2)}
            for name, times in time_row(op, make(), repeats).items():
                row[name] = times
                if "failed" not in times:
                    seconds = timing.best(times)
                    share = max(moved / seconds / bandwidth, flops / seconds / rate)
                    times["share_of_measured_peak"] = round(share, 3)
            row.update(op.torch_rows(described, repeats))
            print(label + "\n    " + "\n    ".join(told(row)), flush=True)
            if not args.interpret:
                with RESULTS.open("a") as f:
                    f.write(json.dumps(row) + "\n")
    return 0


def check_all(ops: list[Any], target: Any, quick: bool) -> int:
    """Runs every case of every operation; how many are wrong."""
    wrong = 0
    for op in ops:
        for name, check in op.checks(target, quick):
            fault = check()
            wrong += fault is not None
            print(f"  {'right' if fault is None else 'WRONG ' + fault}  {name}", flush=True)
    return wrong


def time_row(op: Any, calls: dict[str, Any], repeats: int) -> dict[str, dict]:
    """{name: times} of the calls of a row; each of ours is compared with XLA's result first."""
    from kernels import timing

    found, expected = {}, None
    for name in sorted(calls, key=lambda name: name != "xla"):
        call, inputs = calls[name]
        try:
            result = call(*inputs[0])
            if name == "xla":
                expected = result
            elif name.startswith("mosaic_gpu") and expected is not None:
                error = op.difference(result, expected)
                if not error < op.TOLERANCE:
                    found[name] = {"failed": f"differs from XLA by {error}, not timed"}
                    continue
            found[name] = timing.measure(call, inputs, repeats)
        except Exception as e:  # an alternative may not run this shape: the row says so
            found[name] = {"failed": (str(e).strip() or repr(e)).splitlines()[0][:200]}
    return found


def told(row: dict) -> list[str]:
    """A row's times, one a line."""
    lines = [f"predicted roofline {row['predicted_roofline_us']} us (public peak rates)"]
    for name, value in row.items():
        if isinstance(value, dict) and "failed" in value:
            lines.append(f"{name}: failed: {value['failed']}")
        elif isinstance(value, dict) and "wall_us" in value:
            lines.append(
                f"{name}: kernels {value['kernel_us']} us, wall {value['wall_us']} us, "
                f"{100 * value['share_of_measured_peak']:.0f}% of the measured peak"
            )
        elif name.endswith("_us") and name != "predicted_roofline_us":
            lines.append(f"{name}: {value}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
