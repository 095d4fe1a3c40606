"""What 8-bit and 4-bit weights cost and save: host memory, KL to the dense model, time of a token.

    python benchmarks/quantized.py [--gigabytes 0.5] [--model smollm2-135m]

Memory: an HF checkpoint of random bfloat16 weights is loaded and asked for one token, by a process
of its own for each scheme; its peak resident memory counts pages of mapped files too, and is given
beside what jax and this library take before anything is loaded; `token_s` is the quickest of 15
steps without a cache. KL: `alaya verify MODEL
--quantize`, over a fixed text. Prints JSON lines. Speed wants a quiet machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from convert_memory import synthetic

LOAD = """
import json, os, resource, sys, time
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, numpy as np
import alaya_jax as aj
from alaya_jax.models import llama
jax.block_until_ready(jax.numpy.zeros(8) + 1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
bare, started = peak(), time.perf_counter()
scheme = sys.argv[2]
kind = {"dtype": scheme} if scheme in ("float32", "bfloat16") else {"quantize": scheme}
model = aj.load(sys.argv[1], progress=False, **kind)
seconds, loaded = time.perf_counter() - started, peak()
step = jax.jit(lambda params, token: llama.forward(
    params, model.config, token, np.zeros((1, 1), np.int32), llama.causal_attend)[0])
token = np.ones((1, 1), np.int32)
step(model.params, token).block_until_ready()
times = []
for _ in range(15):
    started = time.perf_counter()
    step(model.params, token).block_until_ready()
    times.append(time.perf_counter() - started)
print(json.dumps({
    "weights_bytes": sum(x.nbytes for x in jax.tree.leaves(model.params)), "load_s": seconds,
    "bare_peak_bytes": bare, "load_peak_bytes": loaded, "peak_bytes": peak(),
    "token_s": min(times),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--model", default="smollm2-135m", help="for the KL")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "source"
        synthetic(path, options.gigabytes * 1e9)
        for scheme in ("float32", "bfloat16", "int8", "int4"):
            done = run([sys.executable, "-c", LOAD, str(path), scheme])
            print(json.dumps({"weights": scheme} | json.loads(done)), flush=True)
    for scheme in ("int8", "int4"):
        verify = [sys.executable, "-m", "alaya_jax.cli", "verify", options.model, "--json"]
        found = json.loads(run([*verify, "--quantize", scheme]))
        line = {"model": options.model, "weights": scheme} | found["logits"]
        print(json.dumps(line), flush=True)


def run(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
