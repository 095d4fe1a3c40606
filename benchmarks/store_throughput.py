"""Storing and reading a context, beside plainly writing and reading as many bytes; and sharing.

    python benchmarks/store_throughput.py [--tokens 65536] [--layers 4] [--rounds 5]

Keys and values of Llama-3-8B's attention shape (8 kv heads of 128, bfloat16, pages of 16) are
written from memory to a new database (flushed, checksummed, in the catalogue), and read from it
(verified), layer by layer. Beside it, in turns and in the same directory: the same arrays to plain
files, one after another, each flushed; and plain files into memory. Before a cold read the files
are pushed out of the page cache. Reports the medians over the rounds of both rates and of their
ratio. Then: what 20 contexts take whose first 90% are the same, in bytes of one.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import ml_dtypes
import numpy as np

from alaya_jax.storage import ContextHeader, PoolStore

HEADS, DIM, PAGE = 8, 128, 16


def header(layers: int) -> ContextHeader:
    return ContextHeader(
        fingerprint="benchmark",
        dtype="bfloat16",
        num_layers=layers,
        num_kv_heads=HEADS,
        head_dim=DIM,
        page_size=PAGE,
    )


def numbers(layers: int, tokens: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    shape = (HEADS, tokens, DIM)
    bits = (rng.integers(0, 1 << 14, shape, np.uint16) for _ in range(2 * layers))
    halves = [x.view(ml_dtypes.bfloat16) for x in bits]
    return list(zip(halves[::2], halves[1::2], strict=True))


def timed(function) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def write_plainly(path: Path, kv: list[tuple[np.ndarray, np.ndarray]]) -> None:
    path.mkdir()
    for i, half in enumerate(x for pair in kv for x in pair):
        with (path / str(i)).open("wb") as file:
            file.write(half.view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())


def read_plainly(path: Path, kv: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for i, half in enumerate(x for pair in kv for x in pair):
        into = np.empty(half.shape, half.dtype)
        with (path / str(i)).open("rb") as file:
            file.readinto(into.view(np.uint8).data)


def forget(path: Path) -> None:
    """Pushes the files below a directory out of the page cache, as far as the system allows."""
    for file in path.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def source(kv: list[tuple[np.ndarray, np.ndarray]]):
    return lambda start: ((k[:, start:], v[:, start:]) for k, v in kv)


def one_round(directory: Path, kv: list, ids: np.ndarray) -> dict[str, float]:
    """Seconds of each step, a step of the store after its plain counterpart."""
    plain, database, seconds = directory / "plain", directory / "db", {}
    seconds["write, plain"] = timed(lambda: write_plainly(plain, kv))
    with PoolStore(database) as store:
        seconds["write"] = timed(lambda: store.write(header(len(kv)), ids, source(kv)))
        (record,) = store.list()

        def read() -> None:
            for layer in range(len(kv)):
                store.read_kv(record.id, layer)

        for kind in ("warm", "cold"):
            for what, step in ((", plain", lambda: read_plainly(plain, kv)), ("", read)):
                if kind == "cold":
                    forget(directory)
                seconds[f"read {kind}{what}"] = timed(step)
    shutil.rmtree(plain)
    shutil.rmtree(database)
    return seconds


def throughput(directory: Path, layers: int, tokens: int, rounds: int) -> Iterator[dict]:
    kv = numbers(layers, tokens)
    ids = np.random.default_rng(1).integers(0, 128_000, tokens).astype(np.int32)
    nbytes = sum(x.nbytes for pair in kv for x in pair)
    done = [one_round(directory, kv, ids) for _ in range(rounds)]
    seconds = {name: [x[name] for x in done] for name in done[0]}
    for what in ("write", "read warm", "read cold"):
        ratios = [p / s for p, s in zip(seconds[f"{what}, plain"], seconds[what], strict=True)]
        yield {
            "what": what,
            "bytes": nbytes,
            "bytes_per_s": nbytes / statistics.median(seconds[what]),
            "plain_bytes_per_s": nbytes / statistics.median(seconds[f"{what}, plain"]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }


def sharing(directory: Path, layers: int, tokens: int) -> dict:
    kv = numbers(layers, tokens)
    rng, same = np.random.default_rng(2), tokens * 9 // 10
    first = rng.integers(0, 128_000, tokens).astype(np.int32)
    with PoolStore(directory / "shared") as store:
        taken = []
        for _ in range(20):
            ids = np.concatenate([first[:same], rng.integers(0, 128_000, tokens - same)])
            store.write(header(layers), ids.astype(np.int32), source(kv))
            taken.append(store.stats().bytes_on_disk)
        found = store.stats()
    shutil.rmtree(directory / "shared")
    return {
        "what": "20 contexts that share 90%",
        "bytes_of_one": taken[0],
        "bytes": taken[-1],
        "times_one": taken[-1] / taken[0],
        "bytes_shared": found.bytes_shared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    asked = parser.parse_args()
    print(json.dumps(machine.facts("numpy", "xxhash")))
    with tempfile.TemporaryDirectory(dir=asked.directory) as name:
        for row in throughput(Path(name), asked.layers, asked.tokens, asked.rounds):
            print(json.dumps(row), flush=True)
        print(json.dumps(sharing(Path(name), asked.layers, min(asked.tokens, 16_384))))


if __name__ == "__main__":
    main()
