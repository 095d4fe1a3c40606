"""A run: every question of a suite under every policy, each answer on disk when it is there."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alaya_jax import __version__
from alaya_jax.budget import Budget
from alaya_jax.db import DB
from alaya_jax.errors import RequestError
from alaya_jax.evaluation import compared
from alaya_jax.evaluation.answers import Answers
from alaya_jax.evaluation.compared import Compared
from alaya_jax.evaluation.measure import Asked
from alaya_jax.evaluation.suite import (
    Source,
    Suite,
    Text,
    digest,
    held_out,
    prompt_ids,
    shared_ids,
    texts,
)
from alaya_jax.evaluation.summary import Summary, summarize
from alaya_jax.evaluation.tasks.item import Item
from alaya_jax.index import Block, Sketch
from alaya_jax.model import Model
from alaya_jax.progress import progress_bar

KEYS = 0.05
"""Share of the keys outside the window that policies read."""

_PAGE = 16


@dataclasses.dataclass(frozen=True)
class Run:
    """What is asked of a model, and how.

    Attributes:
      model: of which.
      suite: what is asked.
      source: where texts come from.
      names: of policies, of `compared.NAMES`; "full" is always among them.
      keys: share of a text's keys that a head reads outside the window.
      seed: of the texts.

    Raises:
      RequestError: there is no such policy, or `keys` is no share.
    """

    model: Model
    suite: Suite
    source: Source = dataclasses.field(default_factory=Source)
    names: tuple[str, ...] = compared.NAMES
    keys: float = KEYS
    seed: int = 1

    def __post_init__(self):
        unknown = [name for name in self.names if name not in compared.NAMES]
        if unknown or not self.names:
            known = ", ".join(compared.NAMES)
            raise RequestError(f"policies {', '.join(unknown)}: use some of {known}")
        if not 0 < self.keys < 1:
            raise RequestError(f"keys={self.keys}: a share of the keys, above 0 and below 1")
        ordered = [name for name in compared.NAMES if name in self.names or name == "full"]
        object.__setattr__(self, "names", tuple(ordered))
        object.__setattr__(self, "suite", self.suite.at(self.model.length_limit))

    def into(self, directory: Path, *, progress: bool = True) -> tuple[Answers, Summary]:
        """Asks what was not asked yet, and writes a summary beside the answers.

        Contexts are stored in the directory while they are needed.

        Args:
          directory: of the answers; see `Answers`.
          progress: shows a bar on stderr when it is a terminal.

        Raises:
          RequestError: the directory holds another run; see also `texts`.
          CacheFullError: a text does not fit into memory.
        """
        asked = texts(self.suite, self.model, self.source, self.seed)
        answers = Answers(directory, self._settings(asked))
        total = len(self.names) * sum(len(text.items) for text in asked)
        lengths = sorted({text.length for text in asked})
        tuning = len(lengths) * compared.steps_of(self.names)
        longest = max(lengths) + 512
        indexes = Sketch(4), Block("leaders"), Block("bounds")
        pages = 2 * (longest // _PAGE + 16)
        budget = Budget.for_pages(self.model, pages, _PAGE, indexes=indexes)
        with (
            DB(directory / "contexts.db", self.model, budget, page_size=_PAGE) as db,
            progress_bar("asking", total + tuning, "steps", show=progress) as advance,
        ):
            advance(len(answers.rows))
            for length in lengths:
                some = [text for text in asked if text.length == length]
                if all(self._is_done(text, answers) for text in some):
                    advance(compared.steps_of(self.names))
                    continue
                policies = self._policies(db, length, answers, advance)
                for text in some:
                    if not self._is_done(text, answers):
                        with self._stored(db, text) as rows:
                            for i, (item, ids) in enumerate(zip(text.items, rows, strict=True)):
                                self._ask(db, text, (i, item, ids), policies, answers, advance)
        shutil.rmtree(directory / "contexts.db")
        summary = summarize(answers.rows.values(), self.names, total)
        answers.keep("summary", summary.to_dict())
        return answers, summary

    def _settings(self, asked: list[Text]) -> dict[str, Any]:
        return {
            "alaya_jax": __version__,
            "model": self.model.name,
            "fingerprint": self.model.fingerprint,
            "dtype": str(np.dtype(self.model.dtype)),
            "suite": self.suite.name,
            "lengths": self.suite.lengths,
            "policies": self.names,
            "keys": self.keys,
            "window": [compared.WINDOW.sink, compared.WINDOW.recent],
            "seed": self.seed,
            "questions": digest(asked),
        }

    def _is_done(self, text: Text, answers: Answers) -> bool:
        return all(
            (f"{text.name}-{i}", name) in answers.rows
            for i in range(len(text.items))
            for name in self.names
        )

    def _policies(self, db: DB, length: int, answers: Answers, advance: Any) -> list[Compared]:
        """What each policy is told at a length; found once, and kept with the answers."""
        kept = answers.kept("policies") or {}
        if str(length) not in kept:
            text = Text(f"held-out-{length}", length, tuple(held_out(self.model, length)))
            with self._stored(db, text) as rows, contextlib.ExitStack() as held:
                sessions = []
                for row in rows:
                    session, rest = db.create_session(row)
                    sessions.append(held.enter_context(session))
                    session.prefill(rest)
                found = compared.settings_of(self.names, sessions, self.keys, advance)
            kept = kept | {str(length): found}
            answers.keep("policies", kept)
        else:
            advance(compared.steps_of(self.names))
        config = self.model.config
        return [compared.compared(name, config, kept[str(length)][name]) for name in self.names]

    @contextlib.contextmanager
    def _stored(self, db: DB, text: Text) -> Iterator[list[np.ndarray]]:
        """Has a text's keys and values in the database while its questions are asked."""
        rows = [prompt_ids(self.model, item) for item in text.items]
        context = db.import_context(shared_ids(rows), title=text.name, progress=False)
        yield rows
        db.remove(context)

    def _ask(
        self,
        db: DB,
        text: Text,
        numbered: tuple[int, Item, np.ndarray],
        policies: Sequence[Compared],
        answers: Answers,
        advance: Any,
    ) -> None:
        """A question under the policies that have not answered it."""
        i, item, ids = numbered
        name = f"{text.name}-{i}"
        missing = [p for p in policies if (name, p.name) not in answers.rows]
        if not missing:
            return
        session, rest = db.create_session(ids)
        with session:
            if len(rest) > 1:
                session.prefill(rest[:-1])
            with contextlib.closing(Asked(session, int(rest[-1]), item)) as asked:
                expected = asked.expected()
                for policy in missing:
                    found = asked.under(policy.attention, expected)
                    row = {
                        "item": name,
                        "policy": policy.name,
                        "task": item.task,
                        "text": text.name,
                        "length": text.length,
                        "tokens": len(ids),
                        "question": item.question,
                        "answers": item.answers,
                        "depth": item.depth,
                        "settings": policy.settings,
                        **found.to_dict(),
                    }
                    answers.add(row)
                    advance(1)
