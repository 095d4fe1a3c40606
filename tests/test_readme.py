"""The tour in the README runs as it is printed."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = "tests/data/declaration.txt"


def python_blocks(markdown: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", markdown, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_tour_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / DOCUMENT).parent.mkdir(parents=True)
    shutil.copy(ROOT / DOCUMENT, tmp_path / DOCUMENT)
    readme = (ROOT / "README.md").read_text()
    tour = readme[readme.index("## A tour") : readme.index("## A Llama-3 checkpoint")]
    names = {}
    said = []
    for block in python_blocks(tour):
        exec(compile(block, "README.md", "exec"), names)
        said.append(capsys.readouterr().out)
    load, first, policies, plan, explained, forks = said
    assert load == ""
    assert len(first.split()) > 3
    assert policies.count("\n") >= 6
    assert len(plan.split()) > 3
    assert "Sketch(bits=4)" in explained
    assert "recovery" in explained
    assert forks.count("\n") >= 2
    # The document was imported, so no prompt about it has more left to prefill than its question.
    assert len(names["rest"]) < 100


@pytest.mark.slow
def test_a_policy_of_ones_own_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks((ROOT / "docs" / "add-a-policy.md").read_text())
    exec(compile(block, "add-a-policy.md", "exec"), {})
    assert "Sketch(bits=4)" in capsys.readouterr().out


def test_every_file_the_documents_link_to_exists():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
