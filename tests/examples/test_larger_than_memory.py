"""The example answers as a pool with room for the whole document does, from the files."""

import runpy
from pathlib import Path

import pytest

import alaya_jax as aj

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "tests" / "data" / "declaration.txt"


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_the_answer_is_that_of_a_pool_with_room(llama3, tmp_path, capsys, beta):
    path, question = llama3(), "Which?"
    ask = runpy.run_path(str(ROOT / "examples" / "larger_than_memory.py"))["ask"]
    ask(TEXT, question, str(path), "128KiB", beta, 8, tmp_path / "db")
    said = capsys.readouterr().out
    model = aj.load(path, progress=False)
    with aj.DB(tmp_path / "db", model) as db:
        document = TEXT.read_text("utf-8")
        asked = [{"role": "user", "content": question}]
        session, rest = db.create_session(messages=asked, document=document)
        plan = aj.DIPR(beta=beta) if beta else aj.Full()
        text = "".join(t.text for t in aj.generate(session, rest, max_new_tokens=8, attention=plan))
        assert f"{db.contexts[0].num_tokens:,} tokens" in said
        in_files = session.reused[0] // db.pool.page_size * db.pool.page_size
        assert in_files * model.token_bytes > 128 * 1024
    assert text in said
    assert f"read where they lie in the database's files [{in_files}]" in said
