"""The tests' own cases: tests are no package, so their modules are read from their files."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parents[2] / "tests"


def module(path: str) -> Any:
    """The module in a file below tests/."""
    file = _TESTS / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found
