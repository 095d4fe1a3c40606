"""How long a new process takes to its first answer, and what the seconds go to.

    python benchmarks/first_answer.py [--runs 3]

Prints JSON lines. Each run is a process of its own: it imports the library, loads SmolLM2-135M,
opens a database and answers by a plan (16 tokens). The first finds no compiled programs on disk,
later ones find those of the first. Wall seconds from the start; `cpu_s` are of all of the process's
threads. The least of the later runs comes last: what other programs do to a machine only adds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import machine

CHILD = """
import json, sys, time
began, cpu = time.perf_counter(), time.process_time()
at = {}
def mark(what):
    at[what] = round(time.perf_counter() - began, 2)
import alaya_jax as aj
import alaya_jax.db, alaya_jax.generation, alaya_jax.model
mark("imported")
model = aj.load("smollm2-135m", progress=False)
mark("loaded")
db = aj.DB(sys.argv[1], model)
session, rest = db.create_session("The capital of France is")
plan = aj.DIPR(beta=50.0)
for token in aj.generate(session, rest, max_new_tokens=16, attention=plan, progress=False):
    at.setdefault("first token", round(time.perf_counter() - began, 2))
mark("answer")
at["asked to answered"] = round(at["answer"] - at["loaded"], 2)
at["cpu_s"] = round(time.process_time() - cpu, 2)
done = aj.compilations()
print(json.dumps({**at, "programs": done.programs, "from_disk": done.read}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="processes behind the first")
    args = parser.parse_args()
    print(
        json.dumps({"benchmark": "first_answer", **machine.facts("alaya_jax", "jax")}), flush=True
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "ALAYA_COMPILATION_CACHE": f"{folder}/programs"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        for run in range(1 + args.runs):
            command = [sys.executable, "-c", CHILD, f"{folder}/db"]
            said = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            rows.append({"run": "later" if run else "first", **json.loads(said)})
            print(json.dumps(rows[-1]), flush=True)
    later = rows[1:]
    least = {key: min(row[key] for row in later) for key in later[0] if key != "run"}
    print(json.dumps({"run": "later, least", **least}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
