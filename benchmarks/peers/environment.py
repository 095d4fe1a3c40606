"""The peer's environment and process: made here, run apart, spoken to in JSON lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
VENV = ROOT / ".cache" / "peer-venv"


class PeerUnavailable(Exception):
    """The peer cannot run here; the message says why and what would help."""


def prepare(python: str | None = None) -> Path:
    """Makes `.cache/peer-venv` when it is missing or its requirements changed; returns its Python.

    Args:
      python: a Python 3.11 to make it with; None: found on PATH or among pyenv's versions.
    """
    interpreter, stamp = VENV / "bin" / "python", VENV / "requirements.txt"
    if stamp.is_file() and stamp.read_bytes() == REQUIREMENTS.read_bytes():
        return interpreter
    python = python or _find_python()
    _say(f"making {VENV.relative_to(ROOT)} with {python} (torch and transformers, once)")
    _must([python, "-m", "venv", "--clear", str(VENV)], "the environment could not be made")
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _must([*pip, "-r", str(REQUIREMENTS)], "pip could not install the peer")
    check = "import torch, transformers, gguf; print(torch.__version__, transformers.__version__)"
    _say(
        f"ready: torch, transformers {_must([str(interpreter), '-c', check], 'it does not import')}"
    )
    stamp.write_bytes(REQUIREMENTS.read_bytes())
    return interpreter


def _find_python() -> str:
    found = subprocess.run(
        [str(ROOT / ".ci" / "find-python"), "3.11"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise PeerUnavailable(
            "the peer needs Python 3.11, where torch has a CPU build; none is on PATH or in pyenv. "
            "Install one ('pyenv install 3.11'), or name it: --peer-python /path/to/python3.11"
        )
    return found.stdout.strip()


def _must(command: list[str], failure: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PeerUnavailable(f"{failure}: {error}") from error
    if done.returncode:
        said = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-6:])
        raise PeerUnavailable(f"{failure} (exit code {done.returncode}):\n  {said}")
    return done.stdout.strip()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class PeerProcess:
    """A script of this folder as a child that computes only while `ask` waits for it."""

    def __init__(self, interpreter: Path, log: Path, script: str = "transformers_peer.py"):
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [str(interpreter), str(Path(__file__).with_name(script))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def ask(self, op: str, **request) -> dict:
        """One request, one answer.

        Raises:
          PeerUnavailable: the peer ended, or answered with an error.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise PeerUnavailable(f"the peer ended with exit code {code}; see {self._log.name}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerUnavailable(f"the peer could not {op}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the peer: it sees the end of its input."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
