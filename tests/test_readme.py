"""The code in the README and in docs/ runs as it is printed."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import alaya_jax as aj

ROOT = Path(__file__).parents[1]
DOCUMENT = "tests/data/declaration.txt"
OWN_TESTS = ("add-a-policy.md", "pure-core.md")
"""Pages whose code is run as printed, on the bundled model or none."""


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


def pages() -> list[str]:
    """Pages with code that runs elsewhere on a tiny model, by their names below docs/."""
    docs = ROOT / "docs"
    found = [p for p in sorted(docs.rglob("*.md")) if python_blocks(p.read_text("utf-8"))]
    return [str(p.relative_to(docs)) for p in found if p.name not in OWN_TESTS]


def with_the_long_ones_slow() -> list:
    """`pages`."""
    long = ("chat.md", "planning.md", "serving.md", "sharing.md", "storage.md")
    return [pytest.param(p, marks=pytest.mark.slow if p in long else []) for p in pages()]


@pytest.fixture(scope="module")
def small(tmp_path_factory, llama3) -> Iterator[Path]:
    """A working directory with the tour's document, and models where the pages say that they are.

    All of them are one tiny Llama 3. The directory keeps one database for all pages.
    """
    from alaya_jax import checkpoint
    from alaya_jax.optimizer.cost import Machine

    place = tmp_path_factory.mktemp("pages")
    (place / DOCUMENT).parent.mkdir(parents=True)
    shutil.copy(ROOT / DOCUMENT, place / DOCUMENT)
    models = place / "models"
    models.mkdir()
    llama3(path=models / "smollm2-135m")
    checkpoint.convert(
        models / "smollm2-135m", models / "Llama-3.2-1B-Instruct-Q4_K_M.gguf", to="gguf-f32"
    )
    for name in ("Llama-3.2-1B-Instruct", "Meta-Llama-3-8B-Instruct"):
        (models / name).symlink_to(models / "smollm2-135m")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("ALAYA_CACHE", str(place / "cache"))
        paper = Machine("paper", 1e10, 1e11, 1e10, 1e-4, 1e-4, 5e-6, 1e-6, 1e-9, 1e-6)
        patch.setattr("alaya_jax.optimizer.situation.machine_for", lambda *_, **__: paper)
        yield place


SMALLER = {
    "make_mesh(data=1, tensor=8)": "make_mesh(data=1, tensor=2)",
    "make_mesh(tensor=8)": "make_mesh(tensor=2)",
    'device="200GiB"': 'device="2MiB"',
    "file:///shared/": "file://{place}/shared/",
    '"/models/': '"{place}/models/',
    '"/data/': '"{place}/data/',
    '"smollm2-135m"': '"{place}/models/smollm2-135m"',
}
"""Hardware and paths that pages name, and what stands for them here."""


@pytest.mark.parametrize("page", with_the_long_ones_slow())
def test_the_code_of_a_page_runs_on_a_tiny_model(page, small):
    """But for blocks that begin with "# Needs", which say what is not here: those compile."""
    names: dict = {}
    for block in python_blocks((ROOT / "docs" / page).read_text("utf-8")):
        code = block
        for printed, here in SMALLER.items():
            code = code.replace(printed, here.format(place=small))
        program = compile(code, page, "exec")
        if not code.startswith("# Needs "):
            exec(program, names)
    if isinstance(db := names.get("db"), aj.DB):
        db.close()


def test_the_code_of_every_page_compiles():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for block in python_blocks(page.read_text("utf-8")):
            compile(block, page.name, "exec")


def test_what_stands_for_hardware_is_still_printed_somewhere():
    printed = "".join((ROOT / "docs" / page).read_text("utf-8") for page in pages())
    assert [name for name in SMALLER if name not in printed] == []


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
