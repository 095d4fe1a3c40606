"""Peak memory and speed of checkpoint conversion, beside a plain copy of the same files.

    python benchmarks/convert_memory.py [--gigabytes 0.5] [--directory DIR]

Makes an HF checkpoint of random bfloat16 weights and converts it HF -> HF, HF -> Orbax and Orbax ->
HF, each in a process of its own whose peak resident memory is read when it ends (pages of mapped
files count too). Source and copies are pushed out of the page cache before each step, as far as the
system allows. The promise: peak <= twice the largest tensor + 500 MiB, whatever the size of the
model. Exits with 1 if it is broken, or if the way back is not byte-equal.
"""

import argparse
import filecmp
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from alaya_jax.checkpoint.hf_write import published_config
from alaya_jax.checkpoint.names import Entry, entries
from alaya_jax.models import LlamaConfig

CONVERT = """
import json, os, resource, sys, time
os.environ["JAX_PLATFORMS"] = "cpu"
from alaya_jax.checkpoint import convert
done = convert(sys.argv[1], sys.argv[2], to=sys.argv[3], progress=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": done.seconds, "peak_bytes": peak}))
"""
BOUND = 500 * 2**20


def synthetic(path: Path, size: float) -> int:
    """Writes an HF checkpoint of about `size` bytes; returns the bytes of its largest tensor."""
    wide = size > 2e9
    sizes = {
        "vocab_size": 32_000,
        "hidden_size": 4096 if wide else 1024,
        "intermediate_size": 14_336 if wide else 4096,
        "num_attention_heads": 32 if wide else 8,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
    }
    one, two = (
        sum(nbytes(e) for e in entries(LlamaConfig(num_hidden_layers=n, **sizes))) for n in (1, 2)
    )
    config = LlamaConfig(num_hidden_layers=max(1, round((size - one) / (two - one)) + 1), **sizes)
    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    data = block.astype(ml_dtypes.bfloat16).tobytes()
    path.mkdir()
    (path / "config.json").write_text(json.dumps(published_config(config)))
    header, end = {}, 0
    for entry in entries(config):
        begin, end = end, end + nbytes(entry)
        shape = list(entry.stored_shape)
        header[entry.hf] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(data)):
            file.write(data[: end - start])
        os.fsync(file.fileno())
    return max(nbytes(e) for e in entries(config))


def nbytes(entry: Entry) -> int:
    return 2 * int(np.prod(entry.shape))


def forget(path: Path) -> None:
    """Asks the system to drop a directory's files from the page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def plain_copy(source: Path, path: Path) -> float:
    """Seconds to copy a directory through user space, until it is on the disk."""
    started = time.perf_counter()
    path.mkdir()
    for file in source.iterdir():
        with file.open("rb") as read, (path / file.name).open("wb") as write:
            while block := read.read(1 << 24):
                write.write(block)
            write.flush()
            os.fsync(write.fileno())
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--directory", help="where to make the files (three times the size)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        root = Path(scratch)
        largest = synthetic(root / "source", options.gigabytes * 1e9)
        size = sum(f.stat().st_size for f in (root / "source").iterdir())
        report({"step": "source", "bytes": size, "largest_tensor": largest})
        forget(root / "source")
        copied = plain_copy(root / "source", root / "copy")
        report({"step": "copy", "seconds": copied, "bytes_per_s": size / copied})
        remove(root / "copy")
        fine = True
        for source, path, to in (
            ("source", "hf", "hf"),
            ("hf", "orbax", "orbax"),
            ("orbax", "back", "hf"),
        ):
            forget(root / source)
            command = [sys.executable, "-c", CONVERT, str(root / source), str(root / path), to]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout)
            held = result["peak_bytes"] <= 2 * largest + BOUND
            fine &= held
            result |= {"bound_bytes": 2 * largest + BOUND, "within_bound": held}
            report(
                {"step": f"{source} to {path}"}
                | result
                | {"speed_beside_copy": copied / result["seconds"]}
            )
            if path == "hf":
                remove(root / "source")
            elif path == "back":
                remove(root / "orbax")
        names = [p.name for p in (root / "hf").iterdir()]
        _, different, errors = filecmp.cmpfiles(root / "hf", root / "back", names, shallow=False)
        report({"step": "compare", "byte_equal": not different and not errors})
        fine &= not different and not errors
    sys.exit(0 if fine else 1)


def remove(path: Path) -> None:
    for file in sorted(path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    path.rmdir()


def report(line: dict) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
