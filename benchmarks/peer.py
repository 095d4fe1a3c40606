"""Ours against transformers + torch: prefill and decode on the CPU, same weights, same threads.

    python benchmarks/peer.py                    # the whole table; keep the machine quiet
    python benchmarks/peer.py --setup-only       # only make the peer's environment
    python benchmarks/peer.py --contexts 1024 --batches 1 --variants dynamic --rounds 1

SmolLM2-135M-Instruct in float32, from one GGUF file, on the same token ids. A measurement is a
prefill (ids to the first token) and then `--new-tokens` greedy steps. The sides take turns (ours,
peer, ours, peer, ...); the one that is not measured waits for input and computes nothing. Medians
count; ratio = peer's seconds / our seconds, so 1.0 or more means not slower.

The peer runs in an environment (.cache/peer-venv, made here, Python 3.11) and a process of its own.
It gets the settings an expert would choose; where that depends on the machine (the kind of cache, a
compiled step), every variant is tried in the warm-up and the fastest of each row is measured.

Results: JSON lines in benchmarks/results/peer.jsonl, the machine first. Exit code 3: no peer here.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import machine
from peers.environment import PeerProcess, PeerUnavailable, prepare
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
TEXT = machine.ROOT / "tests" / "data" / "declaration.txt"
VARIANTS = ("dynamic", "static", "compiled")
PHASES = ("prefill", "decode")
SETTLE_S = 0.5  # thread pools spin for a while after their last work: let them fall asleep


def prompts(tokenize, context: int, batch: int) -> list[list[int]]:
    """`batch` different prompts of `context` tokens: the text, repeated, from different places."""
    ids = tokenize(TEXT.read_text())
    ids = ids * (-(-(context + 97 * batch) // len(ids)))
    return [ids[97 * row : 97 * row + context] for row in range(batch)]


def choose_variants(peer: PeerProcess, ids, new_tokens: int, names, say) -> dict[str, str]:
    """The fastest variant of each phase; a variant that fails here is left out, and said so."""
    seconds: dict[str, dict[str, float]] = {}
    for name in names:
        try:
            peer.ask("measure", ids=ids, new_tokens=new_tokens, variant=name)  # compiles, warms up
            seconds[name] = peer.ask("measure", ids=ids, new_tokens=new_tokens, variant=name)
        except PeerUnavailable as error:
            say(f"peer variant {name!r} left out: {error}")
    if not seconds:
        raise PeerUnavailable("no variant of the peer runs here; see above")
    return {phase: min(seconds, key=lambda name: seconds[name][f"{phase}_s"]) for phase in PHASES}


def measure_peer(peer: PeerProcess, ids, new_tokens: int, chosen: dict[str, str]) -> dict:
    """One measurement; two runs when prefill and decode have different best variants."""
    runs = {
        name: peer.ask("measure", ids=ids, new_tokens=new_tokens, variant=name)
        for name in dict.fromkeys(chosen.values())
    }
    times = {f"{phase}_s": runs[chosen[phase]][f"{phase}_s"] for phase in PHASES}
    return {**times, "tokens": runs[chosen["decode"]]["tokens"]}


def rows_of(context, batch, new_tokens, chosen, ours: list[dict], peer: list[dict]) -> list[dict]:
    """One result a phase."""
    rows = []
    pairs = [
        a == b
        for run, other in zip(ours, peer, strict=True)
        for row, other_row in zip(run["tokens"], other["tokens"], strict=True)
        for a, b in zip(row, other_row, strict=True)
    ]
    for phase in PHASES:
        mine, theirs = ([run[f"{phase}_s"] for run in side] for side in (ours, peer))
        tokens = batch * (context if phase == "prefill" else new_tokens)
        median_mine, median_theirs = statistics.median(mine), statistics.median(theirs)
        rows.append(
            {
                "phase": phase,
                "context": context,
                "batch": batch,
                "tokens": tokens,
                "ours_s": median_mine,
                "peer_s": median_theirs,
                "ours_tokens_per_s": tokens / median_mine,
                "peer_tokens_per_s": tokens / median_theirs,
                "ratio": median_theirs / median_mine,
                "ratio_each_round": [t / m for m, t in zip(mine, theirs, strict=True)],
                "peer_variant": chosen[phase],
                "same_tokens": sum(pairs) / len(pairs),
                "ours_runs_s": mine,
                "peer_runs_s": theirs,
            }
        )
    return rows


def show(console: Console, results: list[dict], title: str) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("phase", "context", "batch", "ours\ntok/s", "peer\ntok/s", "ratio", "each\nround"):
        table.add_column(name, justify="left" if name == "phase" else "right", no_wrap=True)
    table.add_column("peer's\nbest", no_wrap=True)
    table.add_column("same\ntokens", justify="right", no_wrap=True)
    for row in results:
        colour = "green" if row["ratio"] >= 1 else "red"
        each = row["ratio_each_round"]
        table.add_row(
            row["phase"],
            f"{row['context']:,}",
            str(row["batch"]),
            f"{row['ours_tokens_per_s']:,.1f}",
            f"{row['peer_tokens_per_s']:,.1f}",
            f"[{colour}]{row['ratio']:.2f}[/]",
            f"{min(each):.2f}-{max(each):.2f}",
            row["peer_variant"],
            f"{row['same_tokens']:.0%}",
        )
    console.print(table)


def run(arguments: argparse.Namespace, interpreter: Path, console: Console) -> list[dict]:
    # The same cores for both sides: set before a thread pool exists; the peer inherits it.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    say, here = console.print, machine.facts("alaya_jax", "jax", "jaxlib", "flax")
    if here["load_average"] > 0.3 * arguments.threads:
        say(f"[yellow]the machine is busy (load {here['load_average']}): do not trust this run")
    from ours import Ours  # starts jax

    cases = [(context, batch) for context in arguments.contexts for batch in arguments.batches]
    results = []
    with tempfile.TemporaryDirectory(prefix="alaya-bench-") as scratch:
        longest = max(arguments.contexts) + arguments.new_tokens + 1
        ours = Ours(arguments.model, Path(scratch), max(arguments.batches), longest)
        log = Path(scratch) / "peer.log"
        with PeerProcess(interpreter, log) as peer, Progress(console=console) as progress:
            peer_facts = peer.ask("load", gguf=str(ours.gguf), threads=arguments.threads)
            head = {
                "benchmark": "peer",
                **here,
                "threads": arguments.threads,
                "model": ours.gguf.name,
                "dtype": "float32",
                "new_tokens": arguments.new_tokens,
                "rounds": arguments.rounds,
                "peer": peer_facts,
                "ours": ours.facts,
            }
            lines = [head]
            bar = progress.add_task("measuring", total=len(cases) * (arguments.rounds + 1))
            for context, batch in cases:
                ids = prompts(ours.tokenize, context, batch)
                name = f"{context:,} tokens x {batch}"
                progress.update(bar, description=f"{name}: warm-up")
                ours.measure(ids, arguments.new_tokens)
                time.sleep(SETTLE_S)
                chosen = choose_variants(
                    peer, ids, arguments.new_tokens, arguments.variants, progress.console.print
                )
                progress.advance(bar)
                mine, theirs = [], []
                for number in range(arguments.rounds):
                    progress.update(bar, description=f"{name}: round {number + 1}")
                    time.sleep(SETTLE_S)
                    mine.append(ours.measure(ids, arguments.new_tokens))
                    time.sleep(SETTLE_S)
                    theirs.append(measure_peer(peer, ids, arguments.new_tokens, chosen))
                    progress.advance(bar)
                found = rows_of(context, batch, arguments.new_tokens, chosen, mine, theirs)
                results += found
                lines += found
                # After each case: a run that is cut off keeps what it measured.
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    versions = peer_facts["versions"]
    title = (
        f"alaya_jax {head['versions']['alaya_jax']}, jax {head['versions']['jax']} against "
        f"transformers {versions['transformers']}, torch {versions['torch']}\n"
        f"{head['cpu']}, {arguments.threads} threads, {ours.gguf.name} in float32"
    )
    show(console, results, title)
    say(f"written: {os.path.relpath(arguments.output)}")
    return results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096], metavar="TOKENS")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], metavar="N")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decode steps (32)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each side (3)")
    parser.add_argument(
        "--threads", type=int, default=machine.cores(), metavar="N", help="of each side (all cores)"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="peer's, to choose from",
    )
    parser.add_argument("--model", default="smollm2-135m", help="bundled name or GGUF file")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python 3.11 for the environment")
    parser.add_argument("--setup-only", action="store_true", help="make the environment and stop")
    parser.add_argument("--output", type=Path, default=RESULTS / "peer.jsonl", metavar="FILE")
    return parser.parse_args()


def main() -> int:
    arguments, console = parse(), Console(stderr=True)
    try:
        interpreter = prepare(arguments.peer_python)
        if arguments.setup_only:
            print(os.path.relpath(interpreter))
            return 0
        run(arguments, interpreter, console)
    except PeerUnavailable as error:
        print(f"no peer: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
