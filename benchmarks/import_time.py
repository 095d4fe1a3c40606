"""How long `import alaya_jax` and `alaya --help` take, as fresh processes. Prints JSON lines.

    python benchmarks/import_time.py [--repeats 7]

Each command runs once untimed (to warm the file cache and byte code), then `repeats` times; the
median counts. An empty interpreter is measured too: it is part of the other two.
Exit code 1: a target was missed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine

COMMANDS = {  # what: (command, target in seconds)
    "python -c pass": ([sys.executable, "-c", "pass"], None),
    "import alaya_jax": ([sys.executable, "-c", "import alaya_jax"], 0.2),
    "alaya --help": ([str(Path(sys.executable).with_name("alaya")), "--help"], 0.5),
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    elapsed = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}): {done.stderr.strip()}")
    return elapsed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default 7)")
    repeats = parser.parse_args().repeats
    print(json.dumps({"benchmark": "import_time", **machine.facts("alaya_jax")}))
    missed = False
    for what, (command, target) in COMMANDS.items():
        seconds(command)
        runs = sorted(seconds(command) for _ in range(repeats))
        median = statistics.median(runs)
        met = None if target is None else median < target
        missed |= met is False
        row = {"what": what, "median_s": median, "min_s": runs[0], "max_s": runs[-1]}
        print(json.dumps({**row, "target_s": target, "met": met}), flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
