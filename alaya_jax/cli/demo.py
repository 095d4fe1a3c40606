"""`alaya demo`: the whole path on this machine, with a small model and a legal text."""

import dataclasses
import importlib.resources
import json as json_format
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alaya_jax.cli import options
from alaya_jax.cli.terminal import Interrupted, load_jax, note, on_interrupt, report
from alaya_jax.errors import AlayaError
from alaya_jax.units import nbytes

if TYPE_CHECKING:
    import numpy as np

    from alaya_jax.budget import Budget
    from alaya_jax.cli.runtime import Answer
    from alaya_jax.db import DB
    from alaya_jax.model import Model

BETA = 50.0
MAX_NEW_TOKENS = 32
TITLE = "Constitution of the United States"


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about the demo's text.

    Attributes:
      text: as asked.
      expected: any of these must be in a right answer.
    """

    text: str
    expected: tuple[str, ...]

    def is_answered_by(self, answer: str) -> bool:
        """Whether the answer is right."""
        return any(words in answer for words in self.expected)


def document() -> str:
    """The demo's text: the seven articles as of 1787, and a Schedule added for the demo."""
    return _data("constitution.txt").strip()


def questions() -> list[Question]:
    """What the demo asks. How these were chosen: see `alaya_jax.cli.data`."""
    found = json_format.loads(_data("questions.json"))
    return [Question(q["text"], tuple(q["expected"])) for q in found]


def _data(name: str) -> str:
    return importlib.resources.files("alaya_jax.cli.data").joinpath(name).read_text("utf-8")


def demo(
    db: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Keep the database here.",
            show_default="a temporary one, removed at the end",
        ),
    ] = None,
    json: options.Json = False,
    from_disk: Annotated[
        bool, typer.Option(hidden=True, help="Only answer, from the database at --db.")
    ] = False,
) -> None:
    """Let a small real Llama answer questions on this machine.

    SmolLM2-135M-Instruct reads the articles of the U.S. Constitution once, into a database. Then it
    is asked, each question twice: attending to every key (Full), and only to the keys that matter
    (DIPR, those within 50 of the best score; the first and last tokens are always read). Last, a
    new process opens the database from disk and answers again, without computing any token of the
    document. The table shows answers, tokens reused and computed, seconds to the first token,
    tokens per second, and keys read per step.

    A few clauses were added to the text, and are marked in it, because a model of this size needs
    questions whose answers stand in one sentence. Takes one to three minutes on two cores. The
    exit code is 1 when an answer is wrong.

    Examples:
      alaya demo
      alaya demo --json > demo.json
      alaya demo --db constitution.db    then: alaya inspect constitution.db
    """
    if from_disk:
        assert db is not None, "--from-disk needs --db"
        report(answer_from_disk(db))
        return
    started = time.perf_counter()
    place = tempfile.TemporaryDirectory(prefix="alaya-demo-") if db is None else nullcontext(db)
    with place as path, on_interrupt("Nothing half-written is left; run the demo again."):
        result = _run(Path(path) / "contexts.db" if db is None else Path(path))
    result["total_s"] = time.perf_counter() - started
    problems = find_problems(result)
    result["problems"] = problems
    if json:
        report(result)
    else:
        _print(result)
    if problems:
        raise AlayaError("the demo did not go as it should: " + "; ".join(problems))


def _run(path: Path) -> dict[str, Any]:
    """All steps. Progress goes to stderr."""
    load_jax()
    from alaya_jax import prompts
    from alaya_jax.cli import runtime
    from alaya_jax.db import DB
    from alaya_jax.query import DIPR, Full

    full, dipr = Full(), DIPR(beta=BETA)
    clock = time.perf_counter()
    note(f"1. Loading {options.MODEL}")
    model = runtime.load_model(options.MODEL, "stored")
    load_s = time.perf_counter() - clock

    tokenizer = prompts.tokenizer_of(model)
    text = document()
    start = prompts.document_ids(tokenizer, text)
    known = questions()
    asked = [prompts.question_ids(tokenizer, text, q.text) for q in known]
    with DB(path, model, _budget(model, asked)) as db:
        note(f"2. Reading {len(start):,} tokens: {TITLE}")
        imported = runtime.import_document(db, start, TITLE)
        context = imported.context
        note(
            f"   {imported.seconds:.1f} s, stored with {nbytes(context.nbytes)} of keys and values"
        )
        first = _answer(db, asked[0], full, 2)
        clock = time.perf_counter()
        _answer(db, asked[0], dipr, 2)
        compile_s = time.perf_counter() - clock
        note(f"3. Asking {len(known)} questions, under Full and under DIPR(beta={BETA:g})")
        rows = []
        for question, prompt in zip(known, asked, strict=True):
            answers = {"full": _answer(db, prompt, full), "dipr": _answer(db, prompt, dipr)}
            note(f"   {question.text} - {answers['full'].text}")
            rows.append(
                {
                    "question": question.text,
                    "expected": question.expected,
                    **{name: _describe(question, answer) for name, answer in answers.items()},
                    "agree": answers["full"].ids == answers["dipr"].ids,
                }
            )
    note("4. Asking again in a new process, from disk")
    clock = time.perf_counter()
    other = _new_process(path)
    process_s = time.perf_counter() - clock
    for row, answer in zip(rows, other["answers"], strict=True):
        row["from_disk"] = answer
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "title": TITLE,
        "document_tokens": context.num_tokens,
        "document_bytes": context.nbytes,
        "beta": BETA,
        "load_s": load_s,
        "imported": imported.new,
        "import_s": imported.seconds,
        "cold": {
            "computed": len(asked[0]),
            "first_token_s": imported.seconds + first.first_token_s,
        }
        if imported.new
        else None,
        "first_dipr_s": compile_s,
        "new_process": {"total_s": process_s, "load_s": other["load_s"]},
        "questions": rows,
    }


def _budget(model: "Model", asked: "list[np.ndarray]") -> "Budget":
    """Room for the document and any one question."""
    from alaya_jax.cli import runtime

    return runtime.budget_for(model, max(map(len, asked)) + MAX_NEW_TOKENS)


def _answer(
    db: "DB", prompt: "np.ndarray", attention: Any, max_new_tokens: int = MAX_NEW_TOKENS
) -> "Answer":
    from alaya_jax.cli import runtime
    from alaya_jax.runtime.sampling.params import Greedy

    answer = runtime.answer(
        db, prompt, attention=attention, sampling=Greedy(), max_new_tokens=max_new_tokens
    )
    if answer.finish_reason == "interrupted":
        raise Interrupted
    return answer


def _describe(question: Question, answer: "Answer") -> dict[str, Any]:
    return {**answer.to_dict(), "right": question.is_answered_by(answer.text)}


def answer_from_disk(path: Path) -> dict[str, Any]:
    """What the new process does: load the model, open the database, answer all questions.

    Raises:
      ContextError: the document's context is damaged.
    """
    from alaya_jax import prompts
    from alaya_jax.cli import runtime
    from alaya_jax.db import DB
    from alaya_jax.query import Full

    clock = time.perf_counter()
    model = runtime.load_model(options.MODEL, "stored")
    load_s = time.perf_counter() - clock
    tokenizer, text, known = prompts.tokenizer_of(model), document(), questions()
    asked = [prompts.question_ids(tokenizer, text, q.text) for q in known]
    with DB(path, model, _budget(model, asked), read_only=True) as db:
        answers = [
            _describe(question, _answer(db, prompt, Full()))
            for question, prompt in zip(known, asked, strict=True)
        ]
    return {"load_s": load_s, "answers": answers}


def _new_process(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "alaya_jax.cli", "demo", "--from-disk", "--db", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise AlayaError(
            f"the new process could not answer from {path} (exit code {done.returncode}; what it "
            "said stands above)"
        )
    return json_format.loads(done.stdout)


def find_problems(result: dict[str, Any]) -> list[str]:
    """What is not as it should be: wrong answers, other answers from disk, tokens not reused."""
    found = []
    for row in result["questions"]:
        full, disk = row["full"], row["from_disk"]
        if not full["right"]:
            wanted = " or ".join(row["expected"])
            found.append(f"{row['question']!r} was answered {full['text']!r}, without {wanted!r}")
        if disk["ids"] != full["ids"]:
            found.append(f"{row['question']!r} was answered otherwise from disk: {disk['text']!r}")
        for name, answer in (("in memory", full), ("from disk", disk)):
            if answer["reused"] < result["document_tokens"]:
                found.append(
                    f"{row['question']!r} {name} reused only {answer['reused']} of the document's "
                    f"{result['document_tokens']} tokens"
                )
    return found


def _print(result: dict[str, Any]) -> None:
    """The table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    table = Table(title=f"{result['model']} on the {result['title']}", title_justify="left")
    table.add_column("question and answers", ratio=1)
    for name in ("reused", "computed", "first\ntoken", "tokens\n/s", "keys\nread", "keys\nscored"):
        table.add_column(name, justify="right")
    cold = result["cold"]
    for number, row in enumerate(result["questions"]):
        full = row["full"]
        table.add_section()
        table.add_row(f"[bold]{row['question']}[/bold]")
        if cold is not None and number == 0:
            table.add_row(
                "Full, cold", "0", f"{cold['computed']:,}", f"{cold['first_token_s']:.2f} s"
            )
        ways = {"full": "Full", "dipr": f"DIPR({result['beta']:g})", "from_disk": "Full, from disk"}
        for key, way in ways.items():
            answer = row[key]
            keys = answer["keys_per_step"]
            same = key != "full" and answer["ids"] == full["ids"]
            wrong = "" if answer["right"] else " [red](wrong)[/red]"
            table.add_row(
                f"{way}: {'the same' if same else escape(answer['text'].strip())}{wrong}",
                f"{answer['reused']:,}",
                f"{answer['prefilled']:,}",
                f"{answer['first_token_s']:.2f} s",
                f"{answer['tokens_per_s']:.1f}",
                *(f"{keys[name]:,.0f}" if keys else "" for name in ("attended", "scanned")),
            )
    console.print(table)
    agree = sum(row["agree"] for row in result["questions"])
    console.print(
        "reused, computed: tokens of the prompt. cold: the document is read, its keys and values "
        "are stored and programs are compiled before the first token. from disk: in a new process, "
        "which gets its programs ready in its first answer. keys: of one step, mean over layers "
        "and heads; DIPR finds its keys by a scan of all."
    )
    console.print(
        f"DIPR gave Full's answer word for word in {agree} of {len(result['questions'])}. Loading "
        f"the model took {result['load_s']:.1f} s, the demo {result['total_s']:.0f} s."
    )
