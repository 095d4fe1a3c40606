"""The documentation's pages say what is there: names, links, and code that runs."""

import importlib
import re
from pathlib import Path

import pytest

import alaya_jax as aj

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api"


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
