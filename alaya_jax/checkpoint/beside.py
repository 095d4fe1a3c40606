"""Where files lie that are measured of a model, such as calibrations: found by its fingerprint."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from alaya_jax.checkpoint.bundled import cache_directory


def file_name(kind: str, fingerprint: str, suffix: str) -> str:
    """Of such a file, e.g. "alaya-calibration-0123456789ab.json"."""
    return f"alaya-{kind}-{hashlib.sha256(fingerprint.encode()).hexdigest()[:12]}{suffix}"


def places(kind: str, fingerprint: str, suffix: str, directory: Path | None) -> list[Path]:
    """Where a model's file may lie: beside its other files, or in the cache directory.

    Args:
      kind: what it holds.
      fingerprint: of the model.
      suffix: of the file, with its dot.
      directory: of the model's files; None where they are one file, or come in a package.
    """
    name = file_name(kind, fingerprint, suffix)
    near = [] if directory is None else [directory / name]
    return [*near, cache_directory() / kind / name]


def keep(save: Callable[[Path], None], where: list[Path]) -> Path:
    """Saves a file in the first place that can be written; says where.

    Raises:
      OSError: none can be.
    """
    *first, last = where
    for path in first:
        try:
            save(path)
        except OSError:
            continue  # a model that others own: the cache directory is ours
        return path
    save(last)
    return last


def replace(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)
