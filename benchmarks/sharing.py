"""How fast a context goes to a shared directory and back, against a plain copy of as many bytes.

    python benchmarks/sharing.py [--tokens 8192] [--rounds 3] [--directory DIR] [--json]

A context of Llama-3-8B's attention shape (8 kv heads of 128, bf16), 8 of its layers, random
numbers.
A round is: the plain copy (read and written in pieces of 8 MiB, flushed to disk), a push to an
empty `file://` store, a pull into an empty database, a push of what is there, an export to a file
and an import of it. GB/s of keys and values, the median of the rounds, and each as a share of the
copy in its own round. Also the peak of memory that Python and numpy held (in a round of its own).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from alaya_jax.storage import ContextHeader, PoolStore
from alaya_jax.storage.archive import ArchiveReader, ArchiveWriter
from alaya_jax.storage.object_store import SharedStore
from alaya_jax.storage.remote import RemoteContexts

LAYERS, HEADS, DIM = 8, 8, 128
PIECE = 8 << 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=None, help="on which disk")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        while data := read.read(PIECE):
            write.write(data)
        write.flush()
        os.fsync(write.fileno())


def seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def one_round(here: PoolStore, id: str, folder: Path, plain: Path) -> dict[str, float]:
    """Seconds of each way."""
    url, file = f"file://{folder}/shared", folder / "context.alaya"
    took = {"copy": seconds(lambda: copy(plain, folder / "copy"))}
    took["push"] = seconds(lambda: RemoteContexts(SharedStore(url)).push(here, id))
    remote = RemoteContexts(SharedStore(url))
    (moved,) = remote.contexts()
    with PoolStore(folder / "pulled") as there:
        took["pull"] = seconds(lambda: remote.pull(there, moved))
        took["push again"] = seconds(lambda: remote.push(there, id))

    def out() -> None:
        with ArchiveWriter(file) as place:
            RemoteContexts(place).push(here, id)

    def into() -> None:
        with ArchiveReader(file) as place, PoolStore(folder / "imported") as there:
            RemoteContexts(place).pull(there, moved)

    took["export"], took["import"] = seconds(out), seconds(into)
    return took


def main() -> None:
    args = arguments()
    header = ContextHeader(
        fingerprint="benchmark",
        dtype="bfloat16",
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        page_size=16,
    )
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        folder = Path(name)
        shape = (HEADS, args.tokens, DIM)
        bits = random.integers(0, 1 << 14, shape, np.uint16).view(ml_dtypes.bfloat16)
        tokens = random.integers(0, 1000, args.tokens).astype(np.int32)
        with PoolStore(folder / "here") as here:
            id = here.write(header, tokens, lambda _: [(bits, bits)] * LAYERS).id
            nbytes = here.list()[0].nbytes
            plain = folder / "plain"
            with plain.open("wb") as file:
                for _ in range(2 * LAYERS):
                    file.write(bits.view(np.uint8))
            rounds = []
            for i in range(args.rounds):
                place = folder / str(i)
                place.mkdir()
                rounds.append(one_round(here, id, place, plain))
            tracemalloc.start()
            (folder / "traced").mkdir()
            one_round(here, id, folder / "traced", plain)
            peak = tracemalloc.get_traced_memory()[1]
    ways = {
        way: {
            "GB_s": nbytes / 1e9 / statistics.median(r[way] for r in rounds),
            "of_copy": statistics.median(r["copy"] / r[way] for r in rounds),
        }
        for way in rounds[0]
    }
    told = {"bytes": nbytes, "peak_python_bytes": peak, "ways": ways}
    if args.json:
        print(json.dumps(told))
        return
    print(f"{nbytes / 2**20:,.0f} MiB of keys and values; Python held {peak / 2**20:,.0f} MiB")
    for way, found in ways.items():
        print(f"{way:<12}{found['GB_s']:>8.2f} GB/s{found['of_copy']:>8.0%} of a plain copy")


if __name__ == "__main__":
    main()
