"""The peers' environments and processes: made here, run apart, spoken to in JSON lines."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.resolve().parents[1]


class PeerUnavailable(Exception):
    """The peer cannot run here; the message says why and what would help."""


@dataclass(frozen=True)
class Peer:
    """An engine to compare with.

    Attributes:
      name: what it is asked for by.
      script: its process, a file of this folder.
      requirements: what its environment has, a file of this folder; wheels only.
      folder: its environment, in .cache.
      imports: modules that must import, else the environment is no use.
      python: the version it needs; None: that which runs this.
    """

    name: str
    script: str
    requirements: str
    folder: str
    imports: str
    python: str | None = None

    @property
    def venv(self) -> Path:
        return ROOT / ".cache" / self.folder


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "transformers",
            "transformers_peer.py",
            "requirements.txt",
            "peer-venv",
            "torch, transformers, gguf",
            python="3.11",  # where torch has a CPU build
        ),
        Peer(
            "openvino",
            "openvino_peer.py",
            "requirements-openvino.txt",
            "peer-openvino",
            "openvino, openvino_genai",
        ),
        Peer(
            "llamacpp",
            "llamacpp_peer.py",
            "requirements-llamacpp.txt",
            "peer-llamacpp",
            "xllamacpp",
        ),
    )
}


def prepare(python: str | None = None, peer: Peer = PEERS["transformers"]) -> Path:
    """Makes the peer's environment if missing or its requirements changed; returns its Python.

    Args:
      python: what to make it with; None: that which the peer needs, on PATH or among pyenv's.
      peer: whose.

    Raises:
      PeerUnavailable: no such Python, or no wheels for it or for this machine.
    """
    wanted = FOLDER / peer.requirements
    interpreter, stamp = peer.venv / "bin" / "python", peer.venv / "requirements.txt"
    if stamp.is_file() and stamp.read_bytes() == wanted.read_bytes():
        return interpreter
    python = python or (_find_python(peer) if peer.python else sys.executable)
    _say(f"making {peer.venv.relative_to(ROOT)} with {python} ({peer.name}, once)")
    _must([python, "-m", "venv", "--clear", str(peer.venv)], "the environment could not be made")
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _must([*pip, "--only-binary", ":all:", "-r", str(wanted)], f"pip could not install {peer.name}")
    _must([str(interpreter), "-c", f"import {peer.imports}"], f"{peer.name} does not import")
    stamp.write_bytes(wanted.read_bytes())
    return interpreter


def _find_python(peer: Peer) -> str:
    found = subprocess.run(
        [str(ROOT / ".ci" / "find-python"), str(peer.python)],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise PeerUnavailable(
            f"{peer.name} needs Python {peer.python}; none is on PATH or in pyenv. Install one "
            f"('pyenv install {peer.python}'), or name it: --peer-python /path/to/python"
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

    def __init__(self, interpreter: Path, log: Path, script: str):
        self._log = log.open("w+")
        self._process = subprocess.Popen(
            [str(interpreter), str(FOLDER / script)],
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
            self._log.seek(0)
            said = "".join(f"\n  {line.rstrip()}" for line in self._log.readlines()[-6:])
            raise PeerUnavailable(
                f"the peer ended with exit code {code}{':' if said else ''}{said}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise PeerUnavailable(f"the peer could not {op}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the peer: it sees the end of its input."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended, with a request unread
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
