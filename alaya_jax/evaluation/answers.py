"""Answers on disk: a line of JSON each, so that a run that was killed goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any

from alaya_jax.checkpoint.beside import replace
from alaya_jax.errors import RequestError


class Answers:
    """What a run has found so far, in a directory.

    `settings.json` says what is asked; `answers.jsonl` has a line for each question under each
    policy, in which it is on disk before the next question is asked. A line that was cut off in the
    middle is dropped.

    Args:
      directory: made if it is not there.
      settings: JSON data; a run goes on only where they are equal.

    Raises:
      RequestError: the directory holds a run with other settings.
      OSError: it cannot be written.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.settings = json.loads(json.dumps(settings))
        self._file = directory / "answers.jsonl"
        _require_same(directory / "settings.json", self.settings)
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        whole = 0
        if self._file.exists():
            for line in self._file.read_bytes().splitlines(keepends=True):
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                    self.rows[row["item"], row["policy"]] = row  # type: ignore[index]
                except (ValueError, KeyError, TypeError):
                    break
                whole += len(line)
            os.truncate(self._file, whole)

    def add(self, row: dict[str, Any]) -> None:
        """Writes an answer; it has its "item" and its "policy"."""
        line = json.dumps(row)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[row["item"], row["policy"]] = json.loads(line)

    def kept(self, name: str) -> Any:
        """What `keep` wrote under a name; None: nothing."""
        file = self.directory / f"{name}.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else None

    def keep(self, name: str, data: Any) -> None:
        """Writes other JSON data of the run, whole or not at all."""
        _keep(self.directory / f"{name}.json", data)


def _require_same(file: Path, settings: dict[str, Any]) -> None:
    if not file.exists():
        _keep(file, settings)
        return
    there = json.loads(file.read_text("utf-8"))
    if there == settings:
        return
    names = sorted({*there, *settings})
    other = ", ".join(name for name in names if there.get(name) != settings.get(name))
    raise RequestError(
        f"{file.parent} holds a run with other settings ({other}); name another directory (--out), "
        "or delete that one"
    )


def _keep(file: Path, data: Any) -> None:
    replace(file, (json.dumps(data, indent=1) + "\n").encode())
