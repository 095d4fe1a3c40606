"""What is installed, what an import costs, and what must not be committed."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE_FOLDERS = {
    "alaya_jax": "alaya_jax",
    "models": "alaya_jax/models",
    "pallas_kernels": "alaya_jax/pallas_kernels",
    "configs": "alaya_jax/configs",
}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> set[str]:
    """The names inside a wheel built from a copy, so that no stale build folder leaks into it."""
    source = tmp_path_factory.mktemp("source")
    for folder in PACKAGE_FOLDERS:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_puts_one_package_into_site_packages(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"alaya_jax"}


def test_wheel_has_every_module_and_data_file(wheel_names):
    wanted = {
        f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in PACKAGE_FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "alaya_jax/configs/llama-3.1-8b.json" in wanted
    assert "alaya_jax/py.typed" in wanted
    assert wanted - wheel_names == set()


def test_wheel_carries_the_licence_and_the_command(wheel_names):
    metadata = {name.split("/", 1)[1] for name in wheel_names if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt"} <= metadata


@pytest.mark.smoke
def test_import_does_not_load_jax():
    """The command line must answer --help at once, and jax alone takes longer than that."""
    code = (
        "import sys, alaya_jax, alaya_jax.errors; "
        "print([m for m in ('jax', 'numpy', 'flax', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.smoke
def test_every_public_name_can_be_imported():
    import alaya_jax

    assert "DB" in alaya_jax.__all__
    for name in alaya_jax.__all__:
        assert getattr(alaya_jax, name) is not None
    assert set(alaya_jax.__all__) <= set(dir(alaya_jax))


def committed_text_files() -> list[Path]:
    """The files git knows, or would take, that are text."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [p for p in paths if p.is_file() and b"\0" not in p.read_bytes()[:8192]]


def test_no_committed_file_names_a_package_index():
    """Where packages come from is the machine's business: pip's configuration says it, not we."""
    index = re.compile(r"--(extra-)?index-url|--find-links|py" r"pi\.(python\.)?org|/simple/?\b")
    others = [path for path in committed_text_files() if path != Path(__file__)]
    assert [str(p) for p in others if index.search(p.read_text(errors="replace"))] == []


def test_declared_dependencies_are_those_imported():
    """One that is missing breaks users; one too many makes them install what nobody calls."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # By the library itself, where asked for:
    imported = [n for e in ("plot", "dataframe", "grammar", "serve", "eval") for n in extras[e]]
    declared = {re.split(r"[<>=\[ ]", line)[0] for line in [*project["dependencies"], *imported]}
    modules = {
        name.split(".")[0]
        for folder in PACKAGE_FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for name in imported_modules(ast.parse(path.read_text()))
    }
    homes = importlib.metadata.packages_distributions()
    foreign = modules - sys.stdlib_module_names - {"alaya_jax"}
    assert declared == {homes.get(name, [name])[0].lower().replace("_", "-") for name in foreign}


@pytest.mark.parametrize("folder", ["models", "pallas_kernels", "configs"])
def test_a_leaf_knows_nothing_of_the_database(folder):
    allowed = (
        "alaya_jax.errors",
        "alaya_jax.models",
        "alaya_jax.pallas_kernels",
        "alaya_jax.configs",
    )
    imported = {
        (path.name, name)
        for path in (ROOT / folder).rglob("*.py")
        for name in imported_modules(ast.parse(path.read_text()))
    }
    ours = {(file, name) for file, name in imported if name.split(".")[0] == "alaya_jax"}
    assert {(file, name) for file, name in ours if not name.startswith(allowed)} == set()


def imported_modules(tree: ast.Module) -> set[str]:
    """The full names of what a module imports, at any depth of it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write the full name, so that a reader sees where it comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names
