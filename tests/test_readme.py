"""The code in the README and in docs/ runs as it is printed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = "tests/data/declaration.txt"


def python_blocks(markdown: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", markdown, flags=re.DOTALL | re.MULTILINE)


def tour() -> list[str]:
    """The blocks of the README."""
    readme = (ROOT / "README.md").read_text("utf-8")
    return python_blocks(readme[: readme.index("## Several GPUs")])


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Another working directory, with the tour's document and nothing else of this repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / DOCUMENT).parent.mkdir(parents=True)
    shutil.copy(ROOT / DOCUMENT, tmp_path / DOCUMENT)
    return tmp_path


def run(blocks: list[str], capsys) -> tuple[dict, list[str]]:
    """The names that the blocks leave, and what each prints."""
    names, said = {}, []
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        said.append(capsys.readouterr().out)
    return names, said


def check(names: dict, said: list[str]) -> None:
    """What each block of the tour must have said and left."""
    first, document, policies, forks = said
    assert len(first.split()) > 3
    assert len(document.split()) > 3
    assert "Sketch(bits=4)" in policies
    assert "recovery" in policies
    assert forks.count("\n") >= 2
    # The document was imported, so no prompt about it has more left to prefill than its question.
    asked = [{"role": "user", "content": "Who?"}]
    session, rest = names["db"].create_session(messages=asked, document=names["document"])
    assert session.reused[0] > 1000
    assert len(rest) < 100
    assert len(names["chat"].messages) == 4
    assert any(context.title == "a beginning" for context in names["db"].contexts)


@pytest.mark.slow
def test_the_tour_runs_as_printed(elsewhere, capsys):
    check(*run(tour(), capsys))


@pytest.mark.slow
def test_the_tour_runs_on_a_llama_3_whose_tokenizer_adds_a_bos(elsewhere, capsys, llama3):
    llama3(path=elsewhere / "tiny-llama-3")
    first, *others = tour()
    first = first.replace('"smollm2-135m"', '"tiny-llama-3"')
    assert "tiny-llama-3" in first
    names, said = run([first, *others], capsys)
    check(names, said)
    # What transformers would give it: one BOS, that of the template.
    db, document, question = names["db"], names["document"], names["question"]
    model = db.model
    text = model.chat.render([{"role": "user", "content": f"{document}\n\n{question}"}])
    backend = model.tokenizer._backend
    right = backend.encode(str(text), add_special_tokens=False).ids
    assert right[0] == model.tokenizer.bos_id
    session, rest = db.create_session(
        messages=[{"role": "user", "content": question}], document=document
    )
    assert [*session.tokens[0], *rest] == right
    assert session.reused[0] > 2000


@pytest.mark.slow
def test_the_tour_passes_the_type_checker(tmp_path):
    (tmp_path / "alaya_jax").mkdir()
    for folder in ("models", "pallas_kernels", "configs"):
        (tmp_path / "alaya_jax" / folder).symlink_to(ROOT / folder)
    for entry in (ROOT / "alaya_jax").iterdir():
        (tmp_path / "alaya_jax" / entry.name).symlink_to(entry)
    (tmp_path / "tour.py").write_text("\n".join(tour()))
    options = {"include": ["tour.py"], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(options))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_policy_of_ones_own_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks((ROOT / "docs" / "add-a-policy.md").read_text("utf-8"))
    _, said = run(blocks, capsys)
    assert "Sketch(bits=4)" in said[0]
    assert all("recovery" in words for words in said[1:])  # each of those is analyzed


@pytest.mark.slow
def test_the_pure_core_runs_as_printed(capsys):
    names, said = run(python_blocks((ROOT / "docs" / "pure-core.md").read_text("utf-8")), capsys)
    assert "9 pages of 16 tokens" in said[0]
    assert "1 program" in said[2]
    assert float(said[-1]) < 1e-5
    assert names["logits"].shape == (2, 256)
    assert names["memory"].table.length.tolist() == [8, 5]


def test_every_file_the_documents_link_to_exists():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
