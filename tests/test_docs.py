"""The documentation's pages say what is there: names, links, and code that runs."""

import importlib
import itertools
import re
from pathlib import Path

import pytest

import alaya_jax as aj

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api"
FOLDERS = ("alaya_jax", "models", "pallas_kernels", "configs", "tests", "benchmarks", "examples")


def documented() -> set[str]:
    """What the API reference takes docstrings from."""
    pages = "\n".join(page.read_text("utf-8") for page in API.glob("*.md"))
    return set(re.findall(r"^::: (\S+)", pages, flags=re.MULTILINE))


def find(path: str):
    """The object of a dotted name."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        owner, name = path.rsplit(".", 1)
        return getattr(find(owner), name)


def test_every_public_name_is_in_the_api_reference():
    names = {f"alaya_jax.{name}" for name in aj.__all__} - {"alaya_jax.AlayaError"}
    assert names <= documented()
    assert "alaya_jax.errors" in documented()  # with AlayaError and all others


@pytest.mark.parametrize("path", sorted(documented()))
def test_what_the_api_reference_names_is_there_and_says_what_it_is(path):
    assert find(path).__doc__


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:\n")[1]
    listed = set(re.findall(r"[\w/-]+\.md", navigation))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed


def test_the_files_and_names_that_pages_mention_are_there():
    """But for those of decisions, which are of their day."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        if page.name == "decisions.md":
            continue
        text = page.read_text("utf-8")
        for path in re.findall(r"`([a-z_]+/[\w/.-]*\w/?)`", text):
            if path.split("/")[0] not in FOLDERS or "NAME" in path:
                continue
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        for name in re.findall(r"`(alaya_jax(?:\.\w+)+)`", text):
            assert find(name) is not None, f"{page.name}: {name}"


def test_the_scripts_that_pages_run_have_the_options_given_to_them():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(p.read_text("utf-8") for p in pages if p.name != "decisions.md")
    commands = re.findall(r"python3?`? ((?:benchmarks|examples)/\w+\.py)([^`#\n]*)", text)
    assert len(commands) > 10
    for script, arguments in commands:
        source = (ROOT / script).read_text("utf-8")
        for option in re.findall(r"--[a-z][a-z-]*", arguments):
            typers = rf"^    {option[2:].replace('-', '_')}: "  # an argument of typer's function
            assert f'"{option}"' in source or re.search(typers, source, re.M), f"{script} {option}"


def test_between_generate_and_a_kernel_are_at_most_eight_modules():
    """As docs/architecture.md lists them; each, but for the model, imports the next."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d?) ?\| `([\w/.]+\.py)` \|", text, flags=re.MULTILINE)
    walk = [ROOT / path for _, path in rows]
    assert walk[0].stem == "generation"
    assert walk[-1].stem == "mosaic_gpu"
    assert [n for n, _ in rows[1:-1]] == [str(i + 1) for i in range(len(walk) - 2)]
    assert len(walk) - 2 <= 8
    for module, following in itertools.pairwise(walk):
        name = following.parent.name if following.stem == "__init__" else following.stem
        calls_back = module.name == "llama.py"  # what it calls is handed to it
        assert calls_back or re.search(rf"import .*\b{name}\b|\b{name} import", module.read_text())
