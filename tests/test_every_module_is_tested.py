"""Every module has tests: a file of its name in the same place under tests/, or a test that imports
it, or one that names something it defines.
"""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "alaya_jax": "alaya_jax",
    "models": "alaya_jax.models",
    "pallas_kernels": "alaya_jax.pallas_kernels",
    "configs": "alaya_jax.configs",
}


def modules() -> dict[str, Path]:
    """Full name to file. What a package's `__init__` holds, those who import it test."""
    return {
        ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)): path
        for folder, package in PACKAGES.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "__init__.py"
    }


def defined(tree: ast.Module) -> set[str]:
    """The public functions, classes and constants of a module."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


@functools.cache
def named() -> frozenset[str]:
    """What the tests import, look up, or say in a string: a verb, a place to patch."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {alias.name for alias in node.names}
                found |= {str(node.module)} | {f"{node.module}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return frozenset(found)


@pytest.mark.parametrize("name", modules())
def test_has_tests(name):
    tree = ast.parse(modules()[name].read_text("utf-8"))
    *folders, stem = name.split(".")[1:]
    if (ROOT / "tests").joinpath(*folders, f"test_{stem}.py").exists():
        return
    if name in named() or any(text.startswith(f"{name}.") for text in named()):
        return
    assert defined(tree) & named(), f"no test imports {name}, nor names anything it defines"
