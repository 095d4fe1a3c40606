"""Ours against other engines: prefill and decode on the CPU, the same file, the same threads.

    python benchmarks/peer.py                    # the whole table; keep the machine quiet
    python benchmarks/peer.py --setup-only       # only make the peers' environments
    python benchmarks/peer.py --peers llamacpp openvino --weights int4 --output /tmp/int4.jsonl
    python benchmarks/peer.py --contexts 1024 --batches 1 --variants dynamic --rounds 2

SmolLM2-135M-Instruct from one GGUF file, on the same token ids: transformers + torch (float32),
OpenVINO GenAI and llama.cpp (the file's blocks), and ours with the weights that `--weights` names.
Every row tells what each side computes with: they are not the same model to the last bit.

A measurement is a prefill (ids to every sequence's first token) and then `--new-tokens` greedy
steps; an end of text ends nothing. The sides take turns (ours, each peer, ours, each peer, ...);
those that are not measured wait for input and compute nothing. Times are medians over the rounds.
A round's ratio = peer's seconds / our seconds, so 1.0 or more means not slower; a row has their
median and the least.

A peer runs in an environment (.cache/peer-*, made here of wheels) and a process of its own, with
the settings an expert would choose, which its file in benchmarks/peers tells. Where that depends on
the machine (transformers' kind of cache, a compiled step), every variant is tried in the warm-up
and the fastest of each row is measured. A peer that cannot be installed, loaded or measured is left
out, and the table says so.

Results: JSON lines in benchmarks/results/peer.jsonl, the machine first. Exit code 3: no peer here.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import machine
from peers.environment import PEERS, PeerProcess, PeerUnavailable, prepare
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

if TYPE_CHECKING:
    from ours import Ours

RESULTS = Path(__file__).resolve().parent / "results"
TEXT = machine.ROOT / "tests" / "data" / "declaration.txt"
WEIGHTS = ("float32", "bfloat16", "int8", "int4", "stored")  # ours
VARIANTS = ("dynamic", "static", "compiled")  # of transformers
PHASES = ("prefill", "decode")
SETTLE_S = 0.5  # thread pools spin for a while after their last work: let them fall asleep


def prompts(tokenize, context: int, batch: int) -> list[list[int]]:
    """`batch` different prompts of `context` tokens: the text, repeated, from different places."""
    ids = tokenize(TEXT.read_text())
    ids = ids * (-(-(context + 97 * batch) // len(ids)))
    return [ids[97 * row : 97 * row + context] for row in range(batch)]


def stored_types(tensors: Iterable[tuple[str, int]]) -> str:
    """Types of a file's matrices, (name, elements) each, and what part of the elements each has."""
    elements: Counter[str] = Counter()
    for name, count in tensors:
        elements[name] += count
    total = elements.total()
    return ", ".join(f"{name} {count / total:.0%}" for name, count in elements.most_common())


def same_start(mine: list[int], theirs: list[int]) -> int:
    """How many tokens two greedy answers share before they first differ."""
    pairs = zip(mine, theirs, strict=True)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(mine))


@dataclass(frozen=True)
class Loaded:
    """A peer that holds the model: its process, and what it said of itself."""

    name: str
    process: PeerProcess
    facts: dict

    def about(self) -> dict:
        """What it computes with, for its rows."""
        computes = {f"peer_{what}": self.facts[what] for what in ("weights", "activations", "kv")}
        return {"peer": self.name, **computes}


def choose_variants(peer: PeerProcess, ids, new_tokens: int, names, say) -> dict[str, str]:
    """The fastest variant of each phase; a variant that fails here is left out, and said so."""
    seconds: dict[str, dict[str, float]] = {}
    for name in names:
        try:
            found = peer.ask("measure", ids=ids, new_tokens=new_tokens, variant=name)  # warms up
            if len(names) > 1:
                found = peer.ask("measure", ids=ids, new_tokens=new_tokens, variant=name)
            seconds[name] = found
        except PeerUnavailable as error:
            say(f"variant {name!r} left out: {error}")
    if not seconds:
        raise PeerUnavailable("no variant runs here; see above")
    return {phase: min(seconds, key=lambda name: seconds[name][f"{phase}_s"]) for phase in PHASES}


def measure_peer(peer: PeerProcess, ids, new_tokens: int, chosen: dict[str, str]) -> dict:
    """One measurement; two runs when prefill and decode have different best variants."""
    runs = {
        name: peer.ask("measure", ids=ids, new_tokens=new_tokens, variant=name)
        for name in dict.fromkeys(chosen.values())
    }
    times = {f"{phase}_s": runs[chosen[phase]][f"{phase}_s"] for phase in PHASES}
    return {**times, "tokens": runs[chosen["decode"]]["tokens"]}


def rows_of(
    case: dict, new_tokens: int, chosen: dict[str, str], ours: list[dict], peer: list[dict]
) -> list[dict]:
    """One result a phase, for a peer's rounds beside ours.

    Args:
      case: what the row begins with: context and batch, who computes with what.
    """
    answers = [
        (row, other_row)
        for run, other in zip(ours, peer, strict=True)
        for row, other_row in zip(run["tokens"], other["tokens"], strict=True)
    ]
    pairs = [a == b for pair in answers for a, b in zip(*pair, strict=True)]
    rows = []
    for phase in PHASES:
        mine, theirs = ([run[f"{phase}_s"] for run in side] for side in (ours, peer))
        tokens = case["batch"] * (case["context"] if phase == "prefill" else new_tokens)
        median_mine, median_theirs = statistics.median(mine), statistics.median(theirs)
        ratios = [t / m for m, t in zip(mine, theirs, strict=True)]
        rows.append(
            {
                "phase": phase,
                **case,
                "tokens": tokens,
                "ours_s": median_mine,
                "peer_s": median_theirs,
                "ours_tokens_per_s": tokens / median_mine,
                "peer_tokens_per_s": tokens / median_theirs,
                "ratio": statistics.median(ratios),
                "ratio_least": min(ratios),
                "ratio_each_round": ratios,
                "peer_variant": chosen[phase],
                "same_tokens": sum(pairs) / len(pairs),
                "same_start": statistics.mean(same_start(*pair) for pair in answers),
                "ours_runs_s": mine,
                "peer_runs_s": theirs,
            }
        )
    return rows


def show(console: Console, results: list[dict], title: str) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("phase", "tokens", "peer", "ours\ntok/s", "peer\ntok/s", "ratio"):
        left = name in ("phase", "peer")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for name in ("least", "same\ntokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peer's\nbest", no_wrap=True)
    computes = {}
    for row in results:
        about = (row["phase"], f"{row['context']:,} x {row['batch']}", row["peer"])
        if "left_out" in row:
            table.add_row(*about, *["-"] * 5, "left out")
            continue
        ratio, least = (
            f"[{'green' if row[name] >= 1 else 'red'}]{row[name]:.2f}[/]"
            for name in ("ratio", "ratio_least")
        )
        table.add_row(
            *about,
            f"{row['ours_tokens_per_s']:,.1f}",
            f"{row['peer_tokens_per_s']:,.1f}",
            ratio,
            least,
            f"{row['same_tokens']:.0%}",
            row["peer_variant"],
        )
        computes[row["peer"]] = (
            f"weights {row['peer_weights']}; activations {row['peer_activations']}; "
            f"keys and values {row['peer_kv']}"
        )
    console.print(table)
    for peer, what in computes.items():
        console.print(f"{peer}: {what}")


def measure_case(
    arguments: argparse.Namespace,
    case: dict,
    ours: "Ours",
    peers: list[Loaded],
    progress: Progress,
    bar: TaskID,
) -> list[dict]:
    """Rounds of one context and batch: a row a peer and phase; a row that says why, without one.

    Args:
      case: what every row begins with.
      bar: goes on by a step for the warm-up and one for each round.
    """
    ids = prompts(ours.tokenize, case["context"], case["batch"])
    new_tokens, say = arguments.new_tokens, progress.console.print
    name = f"{case['context']:,} tokens x {case['batch']}"
    failed: dict[str, str] = {}
    chosen: dict[str, dict[str, str]] = {}
    mine: list[dict] = []
    theirs: dict[str, list[dict]] = {peer.name: [] for peer in peers}

    progress.update(bar, description=f"{name}: warm-up")
    ours.measure(ids, new_tokens)
    for peer in peers:
        time.sleep(SETTLE_S)
        names = [v for v in peer.facts["variants"] if v in arguments.variants or v not in VARIANTS]
        try:
            chosen[peer.name] = choose_variants(peer.process, ids, new_tokens, names, say)
        except PeerUnavailable as error:
            failed[peer.name] = str(error)
    progress.advance(bar)
    for number in range(arguments.rounds):
        progress.update(bar, description=f"{name}: round {number + 1}")
        time.sleep(SETTLE_S)
        mine.append(ours.measure(ids, new_tokens))
        for peer in peers:
            if peer.name in failed:
                continue
            time.sleep(SETTLE_S)
            try:
                found = measure_peer(peer.process, ids, new_tokens, chosen[peer.name])
                theirs[peer.name].append(found)
            except PeerUnavailable as error:
                failed[peer.name] = str(error)
        progress.advance(bar)

    rows = []
    for peer in peers:
        begin = {**case, **peer.about()}
        if peer.name in failed:
            say(f"{name}: {peer.name} left out: {failed[peer.name]}")
            rows += [{"phase": p, **begin, "left_out": failed[peer.name]} for p in PHASES]
        else:
            rows += rows_of(begin, new_tokens, chosen[peer.name], mine, theirs[peer.name])
    return rows


def run(arguments: argparse.Namespace, interpreters: dict[str, Path], console: Console) -> None:
    # The same cores for all sides: set before a thread pool exists; the peers inherit it.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    say, here = console.print, machine.facts("alaya_jax", "jax", "jaxlib", "flax")
    if here["load_average"] > 0.3 * arguments.threads:
        say(f"[yellow]the machine is busy (load {here['load_average']}): do not trust this run")
    from ours import Ours  # starts jax

    from alaya_jax.checkpoint.gguf import read_header

    cases = [(context, batch) for context in arguments.contexts for batch in arguments.batches]
    room = {
        "batch": max(arguments.batches),
        "length": max(arguments.contexts) + arguments.new_tokens + 1,
    }
    results = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="alaya-bench-")))
        ours = Ours(arguments.model, arguments.weights, scratch, **room)
        peers = []
        for name, interpreter in interpreters.items():
            log = scratch / f"{name}.log"
            process = stack.enter_context(PeerProcess(interpreter, log, PEERS[name].script))
            try:
                facts = process.ask("load", gguf=str(ours.gguf), threads=arguments.threads, **room)
                peers.append(Loaded(name, process, facts))
            except PeerUnavailable as error:
                say(f"[yellow]{name} left out:[/] {error}")
        if not peers:
            raise PeerUnavailable("none could load the model; see above")
        stored = stored_types(
            (tensor.stored_dtype, math.prod(tensor.shape))
            for tensor in read_header(ours.gguf)[1].values()
            if len(tensor.shape) > 1
        )
        head = {
            "benchmark": "peer",
            **here,
            "threads": arguments.threads,
            "model": ours.gguf.name,
            "stored": stored,
            "new_tokens": arguments.new_tokens,
            "rounds": arguments.rounds,
            "peers": {peer.name: peer.facts for peer in peers},
            "ours": ours.facts,
        }
        progress = stack.enter_context(Progress(console=console))
        bar = progress.add_task("measuring", total=len(cases) * (arguments.rounds + 1))
        for context, batch in cases:
            case = {"context": context, "batch": batch, "stored": stored}
            case["ours_weights"] = arguments.weights
            results += measure_case(arguments, case, ours, peers, progress, bar)
            # After each case: a run that is cut off keeps what it measured.
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(line) + "\n" for line in (head, *results))
            arguments.output.write_text(lines)
    versions = {
        package: version
        for facts in (here, *head["peers"].values())
        for package, version in facts["versions"].items()
        if package != "python"
    }
    show(
        console,
        results,
        f"{', '.join(f'{package} {version}' for package, version in versions.items())}\n"
        f"{head['cpu']}, {arguments.threads} threads; {ours.gguf.name} ({stored}); "
        f"our weights: {arguments.weights}",
    )
    say(f"written: {os.path.relpath(arguments.output)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096], metavar="TOKENS")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], metavar="N")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decode steps (32)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each side (5)")
    parser.add_argument(
        "--threads", type=int, default=machine.cores(), metavar="N", help="of each side (all cores)"
    )
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=list(PEERS), help="those that install here"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="float32", help="ours (float32)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="of transformers, to choose from",
    )
    parser.add_argument("--model", default="smollm2-135m", help="bundled name or GGUF file")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python 3.11, for transformers")
    parser.add_argument("--setup-only", action="store_true", help="make environments and stop")
    parser.add_argument("--output", type=Path, default=RESULTS / "peer.jsonl", metavar="FILE")
    return parser.parse_args()


def main() -> int:
    arguments, console = parse(), Console(stderr=True)
    interpreters: dict[str, Path] = {}
    for peer in (PEERS[name] for name in dict.fromkeys(arguments.peers)):
        try:
            interpreters[peer.name] = prepare(arguments.peer_python if peer.python else None, peer)
        except PeerUnavailable as error:
            console.print(f"[yellow]{peer.name} left out:[/] {error}")
    try:
        if not interpreters:
            raise PeerUnavailable("none could be installed; see above")
        if arguments.setup_only:
            print(*(os.path.relpath(path) for path in interpreters.values()), sep="\n")
        else:
            run(arguments, interpreters, console)
    except PeerUnavailable as error:
        print(f"no peer: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
