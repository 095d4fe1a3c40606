"""The database: contexts at rest and in memory, and the sessions that read them.

db = aj.DB("contexts.db", model)
db.import_context(document=document)
messages = [{"role": "user", "content": question}]
session, rest = db.create_session(messages=messages, document=document)
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Listed
from datetime import date as Date
from typing import Any, Literal, overload

import numpy as np

from alaya_jax import prompts
from alaya_jax.cache.pool import PagePool, Sequence
from alaya_jax.contexts import graphs
from alaya_jax.contexts.context import Context, lender, longest_prefix
from alaya_jax.contexts.residents import Residents
from alaya_jax.errors import CacheFullError, ContextError, RequestError
from alaya_jax.index import Graph, Index
from alaya_jax.index.pages import PageIndexes
from alaya_jax.model import Model
from alaya_jax.models.chat import Message
from alaya_jax.progress import progress_bar
from alaya_jax.query.origin import Origin
from alaya_jax.session import Session
from alaya_jax.settings import methods_under_own_settings
from alaya_jax.sharding import memory_of
from alaya_jax.storage import ContextHeader, ContextRecord, DirectoryStore, sampled
from alaya_jax.units import bytes_of

Reuse = Literal["exact", "any"]
"""Which stored keys and values a session takes; see `DB.create_session`."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Memory the database may use.

    Attributes:
      device: for the KV pages of all contexts in use and all sessions, over all devices that the
        pages are split over; bytes, or a string such as "8GiB". What a mesh holds in copies (one
        for each step of its `data` axis) is counted once.
    """

    device: int | str = "2GiB"

    @property
    def device_bytes(self) -> int:
        """`device` in bytes.

        Raises:
          RequestError: not a size.
        """
        return bytes_of(self.device, "Budget(device=...)")


@methods_under_own_settings
class DB:
    """Contexts of one model, on disk and in a pool of pages on the device.

    Threads may share it, each with sessions of its own: they take turns, a program at a time.

    Args:
      path: directory of the database; made if it is not there.
      model: keys and values of other models are kept apart, and never reused.
      budget: memory for pages.
      namespace: contexts are found only in their own namespace.
      page_size: Z, tokens a page.
      read_only: contexts can be read but not stored; several processes may then open the path.

    Raises:
      DatabaseError: the path cannot be used, or another process has it open.
      RequestError: the budget holds no page, or is more memory than there is.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: Model,
        budget: Budget | None = None,
        namespace: str = "",
        *,
        page_size: int = 16,
        read_only: bool = False,
    ):
        if not isinstance(model, Model):
            raise RequestError(f"DB(model={model!r}): load it first, aj.DB(path, aj.load(...))")
        self.model = model
        self.budget = Budget() if budget is None else budget
        if not isinstance(self.budget, Budget):
            raise RequestError(f"DB(budget={budget!r}): write aj.Budget(device={budget!r})")
        self.namespace = namespace
        if not isinstance(page_size, int | np.integer) or page_size < 1:
            raise RequestError(f"DB(page_size={page_size}): must be a count of tokens, at least 1")
        page_bytes = self.token_bytes * page_size
        num_pages = self.budget.device_bytes // page_bytes
        shards = model.rules.page_shards(model.mesh)
        if num_pages < 2 * shards:  # of each part one belongs to nobody
            parts = "" if shards == 1 else f" for each of {shards} devices"
            raise RequestError(
                f"Budget(device={self.budget.device!r}) holds no page{parts}: a page of "
                f"{page_size} tokens of {model.name} takes {page_bytes:,} bytes, and one{parts} "
                f"stays empty; raise the budget to at least {2 * shards * page_bytes:,} bytes"
            )
        there = memory_of(model.mesh)
        if there is not None and self.budget.device_bytes > there:  # else it fails when first used
            raise RequestError(
                f"Budget(device={self.budget.device!r}) is {self.budget.device_bytes:,} bytes, and "
                f"there are {there:,} in all, weights included; give less"
            )
        self.pool = PagePool(
            model.config,
            model.dtype,
            num_pages,
            page_size,
            f"Budget(device={self.budget.device!r})",
            mesh=model.mesh,
            rules=model.rules,
        )
        self._indexes = PageIndexes(self.pool)
        self._store = DirectoryStore(path, read_only=read_only)
        shown = filter(None, map(self._shown, self._store.list()))
        self._contexts = {record.id: Context(record, self._store) for record in shown}
        self._residents = Residents(self._contexts, self.pool, self._store)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, all layers."""
        c = self.model.config
        width = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
        return width * self.model.dtype.itemsize

    @property
    def path(self) -> str:
        """The directory."""
        return str(self._store.path)

    @property
    def contexts(self) -> list[Context]:
        """Contexts of this model and namespace, oldest first, damaged ones too."""
        return sorted(self._contexts.values(), key=lambda c: (c.created, c.id))

    def import_context(
        self,
        text_or_tokens: str | Iterable[int] | np.ndarray | None = None,
        kv: Iterable[tuple[Any, Any]] | None = None,
        *,
        messages: Listed[Message] | None = None,
        document: str | None = None,
        date: Date | None = None,
        title: str = "",
        progress: bool = True,
    ) -> Context:
        """Computes a prompt's keys and values (or takes them) and stores them for later sessions.

        What is stored already is not computed again: the longest stored prefix is reused, and a
        context that is there is returned as it is. Interrupted, nothing is stored.

        Args:
          text_or_tokens: the prompt: text, in which nothing is a control token; what a chat
            template rendered (`model.chat.render`); or token ids.
          kv: per layer keys (after RoPE) and values, each [K, n, D], taken to be exact; None: they
            are computed.
          messages: in place of a text, a conversation that others go on from.
          document: in place of a text, a document to be asked about in the model's chat template,
            behind `messages` such as a system's; `create_session` takes it with the question.
          date: see `create_session`.
          title: for people.
          progress: shows a bar on stderr when it is a terminal.

        Raises:
          RequestError: the prompt is empty, longer than the model allows, or kv has other shapes,
            or numbers that are not finite.
          TokenizerError: the model has no tokenizer, or no chat template for the messages.
          CacheFullError: it does not fit into the budget.
          DatabaseError: it cannot be written.
        """
        tokens, _ = self.prompt(text_or_tokens, messages, document, date, to_store=True)
        self._check_length(tokens)
        header = self._header(title)
        known = self._contexts.get(header.context_id(tokens))
        if known is not None and known.problem is None:
            return known
        self._store.require_writable()
        if kv is not None:
            return self._write(header, tokens, _finite(kv))
        session, rest = self.create_session(tokens)
        with session:
            with progress_bar("reading the document", len(rest), show=progress) as advance:
                session.prefill(rest, on_chunk=advance)
            return self.store(session, title=title)

    @overload
    def create_session(
        self,
        prompt: str | np.ndarray | list[int] | None = None,
        *,
        messages: Listed[Message] | None = None,
        document: str | None = None,
        date: Date | None = None,
        reuse: Reuse = "exact",
    ) -> tuple[Session, np.ndarray]: ...

    @overload
    def create_session(
        self, prompt: list[str] | list[np.ndarray] | list[list[int]], *, reuse: Reuse = "exact"
    ) -> tuple[Session, list[np.ndarray]]: ...

    def create_session(
        self,
        prompt: Any = None,
        *,
        messages: Listed[Message] | None = None,
        document: str | None = None,
        date: Date | None = None,
        reuse: Reuse = "exact",
    ) -> tuple[Session, Any]:
        """Opens a session on the longest stored prefix of a prompt, at any token.

        Args:
          prompt: text, in which nothing is a control token; what a chat template rendered
            (`model.chat.render`); token ids; or a list of such, for a batch.
          messages: in place of a prompt, a conversation for the model's chat template; the
            assistant speaks next. What a message says can never become a control token.
          document: a text in front of the user's first message.
          date: for chat templates that print one. None is today or, with a document, the date under
            which most of it is stored: what follows a date depends on it, and would be computed
            anew each day. `Session.dated` says what was printed.
          reuse: "exact": only keys and values that are those of full attention. What was stored
            after a plan that leaves keys out (`DIPR`, `TopK`, `Window`, `Tiles`) is reused up to
            there; "any": all of it, as the session that stored it would have gone on.

        Returns:
          the session, and the token ids that are left to prefill, int32 [n] (a list for a batch):
          at least the last one, whose logits come next.

        Raises:
          RequestError: a prompt is empty, too long, or has ids outside the vocabulary; `reuse` is
            something else.
          TokenizerError: the model has no tokenizer, or no chat template for the messages.
          ContextError: the stored context is damaged.
          CacheFullError: the stored context does not fit into the budget.
        """
        batched = isinstance(prompt, list | tuple) and not (
            len(prompt) and isinstance(prompt[0], int | np.integer | Mapping)
        )
        if batched and (messages is not None or document is not None):
            raise RequestError("create_session: give a list of prompts or messages=, not both")
        given = prompt if batched else [prompt]
        asked = [self.prompt(p, messages, document, date) for p in given]
        rows = [p.ids for p in asked]
        if not rows:
            raise RequestError("create_session: the list of prompts is empty; give at least one")
        if reuse not in ("exact", "any"):
            raise RequestError(f"create_session(reuse={reuse!r}): use 'exact' or 'any'")
        sequences, found, origins = [], [], []
        with self.pool.lock:
            try:
                for tokens in rows:
                    self._check_length(tokens)
                    context, length = longest_prefix(
                        self._contexts.values(), tokens, exact=reuse == "exact"
                    )
                    found.append(context)
                    origins.append(context.origin.upto(length) if context else Origin())
                    shared = self._residents.share(context, length) if context else Sequence()
                    sequences.append(shared)
            except BaseException:
                for sequence in sequences:
                    self.pool.release(sequence)
                raise
        tokens = [p[: s.length] for p, s in zip(rows, sequences, strict=True)]
        session = Session(
            self.model,
            self.pool,
            self._indexes,
            sequences,
            tokens,
            found,
            origins=origins,
            batched=batched,
        )
        session.dated = asked[0].dated
        session.lender = self._lend
        rest = [p[s.length :] for p, s in zip(rows, sequences, strict=True)]
        return session, rest if batched else rest[0]

    def _lend(self, tokens: np.ndarray, wanted: Graph | None) -> tuple[Context | None, int]:
        with self.pool.lock:
            return lender(self._contexts.values(), tokens, wanted)

    def store(self, session: Session, *, title: str = "", tokens: Any = None) -> Context:
        """Stores what a session holds as a context; the session goes on as before.

        The session may be one of another database, such as a shared one that is open for reading
        only, if its model is the same. What its plans left out is stored with it: see
        `Context.origin`, and `create_session(reuse=...)`.

        Args:
          session: of one sequence.
          title: for people.
          tokens: ids of the session's tokens, needed when it was filled by `Session.update` alone.

        Raises:
          RequestError: the session is empty, a batch, or of another model, or its token ids are
            not known.
          DatabaseError: it cannot be written.
        """
        if not isinstance(session, Session):
            raise RequestError(
                f"store({type(session).__name__}): takes a session; for text or token ids there is "
                "import_context"
            )
        sequence, known = session.sequences[0], session.tokens[0]
        theirs, ours = ((m.fingerprint, m.dtype.name) for m in (session.model, self.model))
        if session.model is not self.model and (theirs != ours or not ours[0]):
            raise RequestError(
                f"store: the session's keys and values are of {session.model.name} {theirs}, and "
                f"this database is of {self.model.name} {ours}; store it in a database that is "
                "opened with the session's model"
            )
        if session.batch_size != 1:
            raise RequestError(
                f"store: the session is a batch of {session.batch_size}, and a context is one "
                "sequence; open a session for each prompt"
            )
        ids = self.model.check_tokens(known if tokens is None else tokens)
        if len(ids) != sequence.length or not len(ids):
            raise RequestError(
                f"store: the session holds {sequence.length} tokens and the ids of {len(ids)} are "
                "known; prefill something first, or pass tokens="
            )
        layers = range(self.model.config.num_hidden_layers)
        kv = (session.pool.read(sequence, layer) for layer in layers)
        origin = session.origins[0].upto(len(ids))
        context = self._write(self._header(title, origin.runs), ids, kv)
        if session.pool is self.pool:
            with self.pool.lock:
                self._residents.keep(context, sequence)
        return context

    def build_index(
        self, context: Context | str, index: Index, *, progress: bool = True
    ) -> Context:
        """Builds an index that a context keeps, on disk beside its keys and values.

        Only `Graph` is such an index: the others are of pages, and grow with them. The model runs
        over the context once more; then each layer's graph is built. An index that is there with
        the same settings is kept; one with others, or a damaged one, is replaced. Interrupted, the
        context is as it was.

        Args:
          context: or its id.
          index: `aj.Graph()`. Plans must ask for the same building settings.
          progress: shows bars on stderr when it is a terminal.

        Raises:
          RequestError: another kind of index, or a mesh with a context axis.
          ContextError: the context is not there, or damaged.
          CacheFullError: the context does not fit into the budget.
          DatabaseError: it cannot be written.
        """
        if not isinstance(index, Graph):
            raise RequestError(
                f"build_index({index!r}): only aj.Graph() is built once and stored; other indexes "
                "are made of pages when a plan first asks them"
            )
        graphs.require_no_context_axis(self.model, "build_index")
        self._store.require_writable()
        id = self._id_of(context, "build_index")
        if id not in self._contexts:
            raise ContextError(f"build_index: there is no context {id!r} in {self.path}")
        known = self._contexts[id]
        if any(index.fits(built) for built in known.indexes) and not self._store.check_index(
            id, graphs.KIND
        ):
            return known
        with self.pool.lock:
            sequence = self._residents.share(known, known.num_tokens)
        try:
            layers = graphs.build_layers(
                self.model, self.pool, sequence, known.tokens, index, progress=progress
            )
            self._store.write_index(id, graphs.KIND, index.built, layers)
        finally:
            self.pool.release(sequence)
        known._graph = None
        return known

    def remove(self, context: Context | str) -> None:
        """Deletes a stored context; sessions that read it go on.

        Raises:
          ContextError: it is not there.
        """
        id = self._id_of(context, "remove")
        with self.pool.lock:
            self._store.remove(id)
            gone = self._contexts.pop(id, None)
            if gone is not None:
                self._residents.drop(gone)

    def check(self, context: Context | str) -> list[str]:
        """Reads a whole stored context and its indexes; every problem found, in words."""
        return list(self._store.check(self._id_of(context, "check")))

    def close(self) -> None:
        """Lets go of the path and the pages; closing twice is allowed."""
        with self.pool.lock:
            for context in self._contexts.values():
                self._residents.drop(context)
        self._store.close()

    def __reduce__(self) -> Any:
        raise RequestError(
            "a database is open in this process and cannot be copied or pickled; pass its path "
            f"({self.path!r}), and open it there"
        )

    def __enter__(self) -> "DB":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"DB({self.path!r}, {self.model.name}, {len(self._contexts)} contexts, "
            f"{self.pool.free_tokens:,} of {self.pool.capacity_tokens:,} tokens "
            "free)"
        )

    def prompt(
        self,
        prompt: Any = None,
        messages: Listed[Message] | None = None,
        document: str | None = None,
        date: Date | None = None,
        *,
        to_store: bool = False,
    ) -> prompts.Prompt:
        """The token ids of a prompt that `create_session` takes or, with `to_store`, of one that
        `import_context` does; see there.

        Raises:
          RequestError, TokenizerError: as there.
        """
        if prompt is None and messages is None and document is None:
            raise RequestError(
                "there is no prompt; give text, token ids (whole numbers), "
                "messages=[{'role': 'user', 'content': ...}], or document="
            )
        if prompt is None:
            tokenizer = prompts.tokenizer_of(self.model)
            found = prompts.prompt(
                tokenizer, messages, document, date, self.contexts, to_store=to_store
            )
            return found._replace(ids=self.model.check_tokens(found.ids))
        if messages is not None or document is not None or date is not None:
            raise RequestError("give a prompt, or messages=, document= and date=, not both")
        if isinstance(prompt, Mapping) or (
            isinstance(prompt, list | tuple) and any(isinstance(p, Mapping) for p in prompt)
        ):
            raise RequestError("these are messages of a chat: pass them as messages=[...]")
        if isinstance(prompt, str):
            prompt = prompts.plain_ids(prompts.tokenizer_of(self.model), prompt)
        return prompts.Prompt(self.model.check_tokens(prompt))

    def _check_length(self, tokens: np.ndarray) -> None:
        if not len(tokens):
            raise RequestError("the prompt has no tokens; give at least one")
        limit = self.model.length_limit
        if len(tokens) > limit:
            raise RequestError(
                f"the prompt has {len(tokens):,} tokens, and {self.model.name} takes up to "
                f"{limit:,}; shorten it, or {self.model.way_to_longer}"
            )
        room = self.pool.capacity_tokens
        if len(tokens) > room:
            pages = math.ceil(len(tokens) / self.pool.page_size)
            shards = self.model.rules.page_shards(self.model.mesh)
            pages = (math.ceil(pages / shards) + 1) * shards  # of each part one belongs to nobody
            needed = pages * self.pool.page_size
            raise CacheFullError(
                f"the prompt has {len(tokens):,} tokens, and the KV cache holds {room:,}; raise "
                f"Budget(device={self.budget.device!r}) to at least {needed * self.token_bytes:,} "
                "bytes"
            )

    def _id_of(self, context: Context | str, what: str) -> str:
        """A context's id; that of another database is not meant by a handle of one's own."""
        if isinstance(context, str):
            return context
        if not isinstance(context, Context):
            raise RequestError(f"{what}({context!r}): takes a context of this database, or its id")
        if context._store is not self._store:
            raise ContextError(
                f"{what}: {context!r} is of the database {str(context._store.path)!r}, opened by "
                f"another DB, and this one is {self.path!r}; pass its id to mean the one here"
            )
        return context.id

    def _header(self, title: str, origin: tuple[tuple[int, str], ...] = ()) -> ContextHeader:
        c = self.model.config
        return ContextHeader(
            fingerprint=self.model.fingerprint,
            dtype=self.model.dtype.name,
            num_layers=c.num_hidden_layers,
            num_kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            page_size=self.pool.page_size,
            origin=origin,
            namespace=self.namespace,
            title=title,
        )

    def _is_ours(self, header: ContextHeader) -> bool:
        return header == self._header(header.title, header.origin)

    def _shown(self, record: ContextRecord) -> ContextRecord | None:
        """The record if it is ours, or may be: it is damaged, or whose it is, is not known.

        One of another model, layout or namespace is not ours to show.
        """
        header = record.header
        if header is None or self._is_ours(header):
            return record
        record = sampled.named(record)
        of_any_model = dataclasses.replace(header, fingerprint=self.model.fingerprint)
        unknown = record.problem == sampled.UNKNOWN_MODEL
        return record if unknown and self._is_ours(of_any_model) else None

    def _write(self, header: ContextHeader, tokens: np.ndarray, kv: Iterable[Any]) -> Context:
        def on_host() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for k, v in kv:
                yield np.asarray(k), np.asarray(v)

        known = self._contexts.get(header.context_id(tokens))
        if known is not None and known.problem is not None:
            self.remove(known)  # damage that the store has not seen, it would keep
        id = self._store.write(header, tokens, on_host())
        with self.pool.lock:
            if id not in self._contexts:
                record = next(r for r in self._store.list() if r.id == id)
                self._contexts[id] = Context(record, self._store)
            return self._contexts[id]


def _finite(kv: Iterable[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys and values, layer by layer: a NaN would reach every later answer, or none, by the plan
    that is asked.
    """
    for layer, (k, v) in enumerate(kv):
        for name, x in (("keys", k), ("values", v)):
            bad = ~np.isfinite(np.asarray(x))
            if bad.any():
                at = ", ".join(map(str, np.argwhere(bad)[0]))
                raise RequestError(
                    f"import_context(kv=...): the {name} of layer {layer} are not finite, first at "
                    f"[{at}] of [K, n, D]; give finite numbers, or leave kv out"
                )
        yield np.asarray(k), np.asarray(v)
