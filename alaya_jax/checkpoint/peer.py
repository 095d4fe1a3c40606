"""Our logits beside those of transformers, which runs in a process and, if need be, a Python of its
own: torch has no build for every Python that this library runs on.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax.checkpoint import transformers_logits
from alaya_jax.checkpoint.conversion import PROMPT
from alaya_jax.checkpoint.params import match
from alaya_jax.checkpoint.source import Source
from alaya_jax.checkpoint.verification import (
    LogitsDifference,
    compare_logits,
    fixed_prompt,
    stream_logits,
    weight_of,
)
from alaya_jax.errors import RequestError
from alaya_jax.progress import progress_bar

AGREE = 1e-4
"""Largest KL at any position, nats, of two programs in float32 that compute the same."""


@dataclasses.dataclass(frozen=True)
class PeerVerification:
    """What this library and another program compute from one checkpoint.

    Attributes:
      a: the checkpoint.
      peer: the program and its version.
      logits: how far the other's predictions (b) are from ours (a), both in float32.
      tokenizer: what differs between the ids that both give the fixed text, a line each.
    """

    a: Path
    peer: str
    logits: LogitsDifference
    tokenizer: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both compute the same, up to rounding."""
        return self.logits.max_kl < AGREE and not self.tokenizer

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `alaya verify --json` prints it."""
        return {"same": self.same} | dataclasses.asdict(self) | {"a": str(self.a)}

    def __str__(self) -> str:
        verb = "computes the same as" if self.same else "does NOT compute the same as"
        lines = [f"alaya_jax {verb} {self.peer} on {self.a}"]
        lines += [f"  tokenizer: {line}" for line in self.tokenizer]
        return "\n".join([*lines, f"  {self.logits}"])


def against_transformers(source: Source, python: str | None, *, progress: bool) -> PeerVerification:
    """Compares an opened checkpoint; see `alaya_jax.checkpoint.verify_against`."""
    if source.format != "hf":
        raise RequestError(
            f"transformers loads Hugging Face directories, and {source.path} is of format "
            f"{source.format}; write one with `alaya convert {source.path} DIR`, and verify DIR"
        )
    weights = {entry.hf: weight_of(source, entry, tensor) for entry, tensor in match(source)}
    tokenizer = source.read_tokenizer()
    tokens = fixed_prompt(source.config, tokenizer)
    total = sum(weight.nbytes for weight in weights.values())
    with progress_bar("computing logits", total, "bytes", show=progress) as advance:
        ours = stream_logits(source.config, weights, tokens, advance)
    theirs, said = _ask(source.path, tokens, python or sys.executable)
    lines: tuple[str, ...] = ()
    if tokenizer is not None and said["ids"] is not None:
        own = tokenizer.encode(PROMPT).tolist()
        if own != said["ids"]:
            lines = (f"the fixed text is {own} here and {said['ids']} there",)
    peer = ", ".join(f"{name} {version}" for name, version in said["versions"].items())
    return PeerVerification(source.path, peer, compare_logits(ours, theirs), lines)


def _ask(path: Path, tokens: np.ndarray, python: str) -> tuple[np.ndarray, dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="alaya-") as scratch:
        request, result = Path(scratch) / "request.json", Path(scratch) / "logits.npy"
        request.write_text(json.dumps({"tokens": tokens.tolist(), "text": PROMPT}))
        script = transformers_logits.__file__
        command = [python, script, str(path.resolve()), str(request), str(result)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, check=False
            )
        except OSError as error:
            raise RequestError(f"{python} cannot be run ({error.strerror})") from error
        if done.returncode:
            last = "\n  ".join(done.stderr.strip().splitlines()[-4:])
            hint = (
                "; name a Python that has both: --peer-python PATH"
                if "ModuleNotFoundError" in done.stderr
                else ""
            )
            raise RequestError(f"transformers under {python} failed{hint}:\n  {last}")
        return np.load(result), json.loads(done.stdout.splitlines()[-1])
