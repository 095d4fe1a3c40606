"""A conversation of several turns in one session, whose earlier ids are never made again."""

import contextlib
import dataclasses
import tempfile
import weakref
from collections.abc import Iterator
from copy import deepcopy
from datetime import date as Date
from functools import partial
from typing import Any

import numpy as np

from alaya_jax.budget import Budget
from alaya_jax.db import DB
from alaya_jax.errors import RequestError, TokenizerError
from alaya_jax.generation import Generation, Token, generate
from alaya_jax.model import Model
from alaya_jax.models.chat import Message
from alaya_jax.models.rendered import Rendered
from alaya_jax.query.plan import Attention
from alaya_jax.runtime.sampling.params import Sampling
from alaya_jax.session import Session
from alaya_jax.settings import methods_under_own_settings

_SAID = "\ue0a1said\ue0a2"
"""In place of what the assistant said last: private-use characters, which no template has."""


def chat(  # noqa: PLR0913 - its keywords are its settings
    model_or_db: Model | DB,
    *,
    system: str | None = None,
    document: str | None = None,
    messages: Any = (),
    attention: Attention | None = None,
    prefill: Attention | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    date: Date | None = None,
    budget: Budget | None = None,
) -> "Chat":
    """Begins a conversation.

        chat = aj.chat(db, system="You answer briefly.")
        for token in chat.say("Name three rivers."):
            print(token.text, end="", flush=True)
        print(chat.say("And one more?").read())

    Each turn adds its own tokens behind those that are in the cache: ids of earlier turns stay as
    they were sampled, whatever the text of an answer would be encoded to.

    Args:
      model_or_db: where it runs. A model gets a database of its own in a temporary directory, gone
        with the chat.
      system: a system's message in front.
      document: a text in front of the user's first message; what a database holds of it
        (`db.import_context(document=...)`) is reused.
      messages: earlier turns, oldest first.
      attention, prefill, sampling, max_new_tokens: of every turn, unless it says otherwise; see
        `generate`.
      date: for chat templates that print one; None: as in `create_session`, at the first turn.
      budget: with a model: memory for keys and values.

    Raises:
      RequestError: it is neither a model nor a database, or a budget was given for a database.
      TokenizerError: the model has no chat template.
    """
    if not isinstance(model_or_db, Model | DB):
        raise RequestError(
            f"chat({type(model_or_db).__name__}): give a model (aj.load) or a database (aj.DB)"
        )
    own = isinstance(model_or_db, Model)
    if not own and budget is not None:
        raise RequestError("chat(db, budget=...): the database has its budget already")
    model = model_or_db if isinstance(model_or_db, Model) else model_or_db.model
    _ = model.chat  # or it says that there is none
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    first += [dict(message) for message in messages]
    home = _Home(model_or_db, budget)
    defaults: dict[str, Any] = {
        "attention": attention,
        "prefill": prefill,
        "sampling": sampling,
        "max_new_tokens": max_new_tokens,
    }
    return Chat(home, _Beginning(first, document, date), defaults)


class _Home:
    """The database of a chat and of its forks; a temporary one goes with the last of them."""

    def __init__(self, given: Model | DB, budget: Budget | None):
        if isinstance(given, DB):
            self.db = given
            return
        place = tempfile.TemporaryDirectory(prefix="alaya-chat-", ignore_cleanup_errors=True)
        try:
            self.db = DB(place.name, given, budget)
        except BaseException:
            place.cleanup()
            raise
        weakref.finalize(self, _remove, self.db, place)


def _remove(db: DB, place: "tempfile.TemporaryDirectory[str]") -> None:
    with contextlib.suppress(Exception):  # also at the interpreter's end, where much is gone
        db.close()
    place.cleanup()


@dataclasses.dataclass(frozen=True)
class _Beginning:
    messages: list[Message]
    document: str | None
    date: Date | None


@dataclasses.dataclass
class _Said:
    """The assistant's turn: its text so far, shared by the chat and whoever reads the answer."""

    pieces: list[str] = dataclasses.field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@methods_under_own_settings
class Chat:
    """A conversation; made by `aj.chat`.

    Attributes:
      session: where it runs; None before the first turn. `db.store(chat.session)` keeps it.
    """

    def __init__(self, home: _Home, beginning: _Beginning, defaults: dict[str, Any]):
        """See `chat`."""
        self._home, self._beginning, self._defaults = home, beginning, defaults
        self._turns: list[Message] = list(beginning.messages)
        self._said: _Said | None = None
        self._prompt = np.zeros(0, np.int32)
        """All ids in front of the answer that comes or came last."""
        self.session: Session | None = None

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, with what there is of an answer under way."""
        turns: list[Message] = [dict(turn) for turn in self._turns]
        if self._said is not None:
            turns.append({"role": "assistant", "content": self._said.text})
        return turns

    @property
    def ids(self) -> np.ndarray:
        """Token ids of the conversation so far, int32 [n]: read, or waiting to be read."""
        have = self._have()
        return have if len(have) >= len(self._prompt) else self._prompt

    def say(self, text: str, **options: Any) -> "Answer":
        """The user's next turn; gives the answer, token by token as it is read.

        An answer that was left (`break`) ends where it was left.

        Args:
          text: what the user says; names of control tokens in it are plain characters.
          options: `attention`, `prefill`, `sampling`, `max_new_tokens`, or what else `generate`
            takes, for this turn.

        Raises:
          RequestError, CacheFullError, TokenizerError: as `create_session` and `generate`; the
            conversation is then as it was before.
        """
        if not isinstance(text, str):
            raise RequestError(f"say({type(text).__name__}): takes a text")
        turns = [*self.messages, {"role": "user", "content": text}]
        if self.session is None:
            begin = self._beginning
            session, rest = self._home.db.create_session(
                messages=turns, document=begin.document, date=begin.date
            )
            prompt = np.concatenate([session.tokens[0], rest])
            generation = self._generate(session, rest, options)
            self.session = session
        else:
            session, have = self.session, self._have()
            ended = len(have) > len(self._prompt) and int(have[-1]) in self._end_ids()
            # The template says how a turn ends; the id that ended it is not in the cache yet.
            keep = have[:-1] if ended else have
            left = self._prompt[len(keep) :]  # of a prompt that was not read to its end
            prompt = np.concatenate([keep, left, self._behind_the_answer(turns)]).astype(np.int32)
            pending = session.batch.pending[0]
            try:
                if ended:
                    session.batch.pending[0] = pending[:-1]
                waiting = len(session.tokens[0]) + len(session.batch.pending[0])
                generation = self._generate(session, prompt[waiting:], options)
            except BaseException:
                session.batch.pending[0] = pending
                raise
        self._turns, self._prompt, self._said = turns, prompt, _Said()
        return Answer(generation, self._said)

    def go_on(self, **options: Any) -> "Answer":
        """More of the last answer, where it was left or cut at `max_new_tokens`.

        Raises:
          RequestError: there is none, or it ended by itself; or as `generate`.
        """
        if self.session is None or self._said is None:
            raise RequestError("go_on(): nothing was said yet; begin with say(...)")
        have = self._have()
        if len(have) > len(self._prompt) and int(have[-1]) in self._end_ids():
            raise RequestError("go_on(): the answer has ended; say(...) something")
        generation = self._generate(self.session, self._prompt[len(have) :], options)
        return Answer(generation, self._said)

    def fork(self) -> "Chat":
        """A second conversation that goes on from here; both share what is in the cache."""
        other = Chat(self._home, self._beginning, dict(self._defaults))
        other._turns, other._prompt = deepcopy(self._turns), self._prompt
        if self._said is not None:
            other._said = _Said(list(self._said.pieces))
        other.session = self.session and self.session.fork()
        return other

    def reset(self) -> None:
        """Back to the beginning: system's message, document and earlier turns stay."""
        self.close()
        self._turns, self._said = list(self._beginning.messages), None
        self._prompt, self.session = np.zeros(0, np.int32), None

    def close(self) -> None:
        """Gives the session's room back."""
        if self.session is not None:
            self.session.close()

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Chat({self._home.db.model.name}, {len(self.messages)} messages)"

    def _have(self) -> np.ndarray:
        """Ids in the cache and those that wait to be read."""
        if self.session is None:
            return np.zeros(0, np.int32)
        waiting = np.asarray(self.session.batch.pending[0], np.int32)
        return np.concatenate([self.session.tokens[0], waiting])

    def _end_ids(self) -> set[int]:
        return set(self._home.db.model.eos_ids)

    def _generate(self, session: Session, tokens: Any, options: dict[str, Any]) -> Generation:
        return generate(session, tokens, **(self._defaults | options))

    def _behind_the_answer(self, turns: list[Message]) -> np.ndarray:
        """Ids that the template prints behind the last answer: its end, and the user's turn."""
        model = self._home.db.model
        assert model.tokenizer is not None
        marked = [*turns[:-2], {**turns[-2], "content": _SAID}, turns[-1]]
        whole = model.chat.render(marked, date=self._beginning.date)
        if _SAID not in whole:
            raise TokenizerError(
                "the chat template does not print what the assistant said as it is, so a "
                "conversation cannot go on in one session; use create_session(messages=...)"
            )
        ((printer, data),) = whole.parts
        rest = Rendered(_behind(printer, data), [(partial(_behind, printer), data)])
        # Behind a control token, so that no space is put in front as at the beginning of a text.
        anchor = model.tokenizer.named_tokens.get("eos_token", "")
        if not anchor:
            return model.encode(rest)
        ids = model.encode(Rendered(anchor) + rest)
        return ids[len(model.encode(Rendered(anchor))) :]


def _behind(printer: Any, data: Any) -> str:
    text: str = printer(data)
    return text[text.rindex(_SAID) + len(_SAID) :]


@methods_under_own_settings
class Answer(Iterator[Token]):
    """What the assistant says, token by token; the conversation has each when it is read.

    Attributes:
      generation: the run behind it: `ids`, `timing`.
    """

    def __init__(self, generation: Generation, said: _Said):
        """Made by a chat."""
        self.generation, self._said = generation, said

    @property
    def text(self) -> str:
        """The answer so far, also what was said before `go_on`."""
        return self._said.text

    @property
    def finish_reason(self) -> str | None:
        """Why it ended; None where it has not."""
        return self.generation.finish_reason

    def read(self) -> str:
        """Reads on to the end; the whole text."""
        for _ in self:
            pass
        return self.text

    def __next__(self) -> Token:
        token = next(self.generation)
        self._said.pieces.append(token.text)
        return token

    def __repr__(self) -> str:
        return f"Answer({self.text!r}, {self.finish_reason})"
