"""The database: contexts at rest and in memory, and the sessions that read them.

db = aj.DB("contexts.db", model)
db.import_context(document=document)
messages = [{"role": "user", "content": question}]
session, rest = db.create_session(messages=messages, document=document)
"""

import dataclasses
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date as Date
from typing import Any, Literal, Protocol, overload

import numpy as np

from alaya_jax import prompts
from alaya_jax.at_rest import STORE_DTYPES, StoreDtype
from alaya_jax.budget import Budget
from alaya_jax.cache.pool import PagedSequence, PagePool
from alaya_jax.cache.residency import PagesMet
from alaya_jax.contexts import graphs
from alaya_jax.contexts.catalogue import Catalogue, Home, Tier, finite
from alaya_jax.contexts.context import Context
from alaya_jax.contexts.sharing import Sharing
from alaya_jax.errors import CacheFullError, RequestError
from alaya_jax.index import Graph, Index
from alaya_jax.model import Model
from alaya_jax.models.chat import Message
from alaya_jax.progress import progress_bar
from alaya_jax.session import Session
from alaya_jax.settings import methods_under_own_settings
from alaya_jax.storage import PoolStore, StoreStats
from alaya_jax.storage.object_store import SharedStore
from alaya_jax.storage.remote import RemoteContexts
from alaya_jax.units import nbytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatabaseStats(StoreStats):
    """What a database holds: `StoreStats`, and the pool of this process.

    Attributes:
      bytes_pool: keys and values that the pool has room for.
      bytes_pool_used: of these, in pages of contexts in memory and of sessions.
      bytes_beside: what each index of pages and each context's graph takes beside the pool, by
        account: those that are in memory, and those that sessions ask.
      device_limit: bytes that these and the pool may be, `Budget(device=...)`.
      bytes_beside_host: as `bytes_beside`, on the CPU beside the model's devices
        (`create_session(tier="host")`); a part of `host_limit`.
      bytes_host: keys and values of mapped files, and what indexes know of them, that were read
        and not let go of since.
      bytes_host_leaves: of these, what indexes know.
      host_limit: bytes that they may be, `Budget(host=...)`; None: no bound.
      pages_memory: how often a program met a mapped page of a kv head that was in memory, by this
        account.
      pages_disk: and one that was not.
      bytes_read: keys and values that came into memory so.
      bytes_verified: that were compared with their checksums.
    """

    bytes_pool: int
    bytes_pool_used: int
    bytes_beside: dict[str, int]
    device_limit: int
    bytes_beside_host: dict[str, int]
    bytes_host: int
    bytes_host_leaves: int
    host_limit: int | None
    pages_memory: int
    pages_disk: int
    bytes_read: int
    bytes_verified: int

    @property
    def hit_rate(self) -> float | None:
        """Share of the mapped pages met that were in memory; None where none was met."""
        return PagesMet.hit_rate(self.pages_memory, self.pages_disk)

    def rows(self) -> dict[str, str]:
        """The same for people."""
        pool = f"{nbytes(self.bytes_pool_used)} of {nbytes(self.bytes_pool)} are in use"
        most = "no bound" if self.host_limit is None else f"at most {nbytes(self.host_limit)}"
        leaves = nbytes(self.bytes_host_leaves)
        host = f"{nbytes(self.bytes_host)} of mapped pages are kept ({most}; {leaves} of leaves)"
        rows = super().rows() | {"pool": pool}
        left = self.device_limit - self.bytes_pool
        rows["beside"] = f"{_listed(self.bytes_beside)} (at most {nbytes(left)}, beside the pool)"
        rows["host"] = host
        if self.bytes_beside_host:
            rows["host"] += f"; beside them {_listed(self.bytes_beside_host)}"
        if self.hit_rate is not None:
            rows["met"] = (
                f"{self.pages_memory + self.pages_disk:,} mapped pages, {self.hit_rate:.1%} were "
                f"in memory; {nbytes(self.bytes_read)} read, {nbytes(self.bytes_verified)} verified"
            )
        return rows


class Closes(Protocol):
    """What can be closed."""

    def close(self) -> None:
        """Ends it; closing twice is allowed."""


def _listed(sizes: dict[str, int]) -> str:
    """Bytes of indexes, and of each."""
    each = ", ".join(f"{name} {nbytes(size)}" for name, size in sizes.items())
    return f"{nbytes(sum(sizes.values()))} of indexes" + (f": {each}" if each else "")


Reuse = Literal["exact", "any"]
"""Which stored keys and values a session takes; see `DB.create_session`."""


@methods_under_own_settings
class DB:
    """Contexts of one model, on disk and in a pool of pages on the device.

    Threads may share it, each with sessions of its own, and beside an `aj.Engine`: they take turns,
    a program at a time.

    Args:
      path: directory of the database; made if it is not there.
      model: keys and values of other models are kept apart, and never reused.
      budget: memory for pages, and for indexes beside them.
      namespace: contexts are found only in their own namespace.
      page_size: Z, tokens a page.
      read_only: contexts can be read but not stored.
      remote: URL of a shared store (`file:///shared/directory/`, `s3://bucket/path/`,
        `gs://bucket/path/`) of which this database is one of many: what it knows of a prompt's
        beginning, of the same model and namespace, and this database does not, is taken from
        there in place of being computed; what is stored here is stored there too, before `store`
        or `import_context` returns. Whatever fails there loses nothing here: the prompt is
        computed, the context is stored here, and an `aj.RemoteWarning` says what was not shared,
        why, and what to do. Credentials are those of the environment; a request may take
        ALAYA_REMOTE_TIMEOUT seconds (60).
      store_dtype: "int8" or "fp8" (float8_e4m3): new contexts are stored in 8 bits, with a scale
        for each token and kv head, in half (bfloat16) or a quarter (float32) of the bytes. None: as
        they were computed. What was stored in 8 bits is not exact, and never taken for it: its
        `Context.origin` says so, a session that asks for exact keys and values passes it over, and
        one that reads it says so in `explain()`. Contexts of all kinds may lie in one database.

    Several processes may open the path; who stores a context waits for its turn, and all see it
    then.

    Raises:
      DatabaseError: the path cannot be used.
      RequestError: the budget holds no page, or is more memory than there is; `remote` is no such
        URL, or is given with `read_only`, where nothing could be taken.
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
        remote: str | None = None,
        store_dtype: StoreDtype | None = None,
    ):
        if not isinstance(path, str | os.PathLike):
            raise RequestError(f"DB({path!r}, ...): the first argument is the path of a directory")
        if not isinstance(model, Model):
            raise RequestError(f"DB(model={model!r}): load it first, aj.DB(path, aj.load(...))")
        self.model = model
        self.budget = Budget() if budget is None else budget
        if not isinstance(self.budget, Budget):
            raise RequestError(f"DB(budget={budget!r}): write aj.Budget(device={budget!r})")
        self.namespace = namespace
        if not isinstance(page_size, int | np.integer) or page_size < 1:
            raise RequestError(f"DB(page_size={page_size}): must be a count of tokens, at least 1")
        if remote is not None and read_only:
            raise RequestError(
                f"DB(remote={remote!r}, read_only=True): what is taken from there is stored here; "
                "leave out one of the two"
            )
        if store_dtype not in (None, *STORE_DTYPES):
            raise RequestError(
                f"DB(store_dtype={store_dtype!r}): use one of {', '.join(STORE_DTYPES)}, or None "
                "to store keys and values as they were computed"
            )
        self.store_dtype = store_dtype
        self.budget.pages(model, page_size)  # refused before anything is made
        shared = RemoteContexts(SharedStore(remote)) if remote is not None else None
        store = PoolStore(path, read_only=read_only)
        self._catalogue = Catalogue(
            store,
            model,
            namespace,
            page_size=page_size,
            budget=self.budget,
            store_dtype=store_dtype,
        )
        self._sharing = Sharing(self._catalogue, shared) if shared is not None else None
        self._users = weakref.WeakSet[Closes]()

    @property
    def pool(self) -> PagePool:
        """The pages of all contexts in memory and of all sessions."""
        return self._catalogue.pool

    @property
    def home(self) -> Home:
        """Where sequences of the pool are: what indexes know of them, and the model's layers."""
        return self._catalogue.home

    @property
    def catalogue(self) -> Catalogue:
        """Its contexts, as they are found, and held in the pool."""
        return self._catalogue

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, all layers."""
        return self.model.token_bytes

    @property
    def path(self) -> str:
        """The directory."""
        return str(self._catalogue.store.path)

    @property
    def contexts(self) -> list[Context]:
        """Contexts of this model and namespace, oldest first, damaged ones too."""
        return self._catalogue.contexts

    def import_context(
        self,
        text_or_tokens: str | Iterable[int] | np.ndarray | None = None,
        kv: Iterable[tuple[Any, Any]] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        document: str | None = None,
        date: Date | None = None,
        title: str = "",
        progress: bool | Callable[[int], None] = True,
    ) -> Context:
        """Computes a prompt's keys and values (or takes them) and stores them for later sessions.

        What is stored already is not computed again: the longest stored prefix that is exact is
        reused, and a context that is there is returned as it is. If it is interrupted, nothing is
        stored. With a `remote`, what is stored there counts as well, and the context is stored
        there too.

        Args:
          text_or_tokens: the prompt: text, in which nothing is a control token; what a chat
            template rendered (`model.chat.render`); or token ids.
          kv: per layer keys (after RoPE) and values, each [K, n, D], taken to be exact; None: they
            are computed.
          messages: in place of a text, a conversation for later sessions to continue.
          document: in place of a text, a document to ask about in the model's chat template; it
            comes after `messages`, such as a system message. `create_session` takes it with the
            question.
          date: see `create_session`.
          title: for people.
          progress: shows a bar on stderr when it is a terminal; or is called with the number of
            tokens that are found, if any, and with those of each chunk that is computed.

        Raises:
          RequestError: the prompt is empty, longer than the model allows, or kv has other shapes,
            or numbers that are not finite.
          TokenizerError: the model has no tokenizer, or no chat template for the messages.
          CacheFullError: it does not fit into the budget.
          DatabaseError: it cannot be written.
        """
        tokens, _ = self.prompt(text_or_tokens, messages, document, date, to_store=True)
        self._check_length(tokens)
        if kv is None:
            self._fetch([tokens])
        known = self._catalogue.of_tokens(tokens)
        if known is not None and known.problem is None:
            return self._shared(known)
        self._catalogue.store.require_writable()
        if kv is not None:
            return self._shared(self._catalogue.insert(tokens, finite(kv), title=title))
        session, rest = self.create_session(tokens, reuse="exact")
        with session:
            show = bool(progress) and not callable(progress)
            with progress_bar("reading the document", len(rest), show=show) as advance:
                if callable(progress):
                    advance = progress
                    if found := len(tokens) - len(rest):
                        advance(found)
                session.prefill(rest, on_chunk=advance)
            return self.store(session, title=title)

    @overload
    def create_session(
        self,
        prompt: str | np.ndarray | list[int] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        document: str | None = None,
        date: Date | None = None,
        reuse: Reuse | None = None,
        tier: Tier | None = None,
    ) -> tuple[Session, np.ndarray]: ...

    @overload
    def create_session(
        self,
        prompt: list[str] | list[np.ndarray] | list[list[int]],
        *,
        reuse: Reuse | None = None,
        tier: Tier | None = None,
    ) -> tuple[Session, list[np.ndarray]]: ...

    def create_session(
        self,
        prompt: Any = None,
        *,
        messages: Sequence[Message] | None = None,
        document: str | None = None,
        date: Date | None = None,
        reuse: Reuse | None = None,
        tier: Tier | None = None,
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
            there, what was stored in 8 bits not at all; "any": all of it is reused, as if the
            session that stored it went on. None: "exact" or, in a database that was opened with a
            `store_dtype`, "any".
          tier: where the stored pages are read. "device": in the pool, into which those that are
            not there come now. "host": where they lie in the database's files, which are mapped:
            nothing is read now, nothing of them counts as part of the budget, and a context may be
            larger than memory. Where the model runs on a GPU or a mesh, the CPU attends, and keeps
            the new tokens too, 8,192 of all such sessions. None: in the pool if the prompt fits
            into it, else in the files where that can be.

        Returns:
          the session, and the token ids that are left to prefill, int32 [n] (a list for a batch):
          at least the last one, whose logits come next.

        Raises:
          RequestError: a prompt is empty, too long, or has ids outside the vocabulary; `reuse` or
            `tier` is something else, or not to be had here.
          TokenizerError: the model has no tokenizer, or no chat template for the messages.
          ContextError: the stored context is damaged.
          CacheFullError: what is not read in the files does not fit into the budget.
        """
        batched = isinstance(prompt, list | tuple) and not (
            len(prompt) and isinstance(prompt[0], int | np.integer | Mapping)
        )
        if batched and (messages is not None or document is not None):
            raise RequestError("create_session: give a list of prompts or messages=, not both")
        given = prompt if batched else [prompt]
        self.pool.prepare()
        asked = [self.prompt(p, messages, document, date) for p in given]
        rows = [p.ids for p in asked]
        if not rows:
            raise RequestError("create_session: the list of prompts is empty; give at least one")
        if reuse not in ("exact", "any", None):
            raise RequestError(f"create_session(reuse={reuse!r}): use 'exact', 'any' or None")
        exact = reuse == "exact" or (reuse is None and self.store_dtype is None)
        if tier not in (None, "device", "host"):
            raise RequestError(f"create_session(tier={tier!r}): use 'device', 'host' or None")
        for tokens in rows:
            self._check_length(tokens)
        self._fetch(rows, exact=exact)
        batch, found = self._catalogue.open(rows, exact=exact, tier=tier)
        try:
            for tokens, sequence in zip(rows, batch.sequences, strict=True):
                self._check_room(len(tokens), sequence, batch.pool)
        except CacheFullError:
            batch.release()
            raise
        session = Session(batch, found, batched=batched, dated=asked[0].dated)
        rest = [p[n:] for p, n in zip(rows, batch.reused, strict=True)]
        return session, rest if batched else rest[0]

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

        def kv(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            return (session.pool.read(sequence, layer, start) for layer in layers)

        origin = session.origins[0].upto(len(ids))
        context = self._catalogue.insert(ids, kv, title=title, origin=origin)
        if session.pool is self.pool:
            self._catalogue.keep(context, sequence)
        return self._shared(context)

    def build_index(
        self, context: Context | str, index: Index, *, progress: bool = True
    ) -> Context:
        """Builds an index that a context keeps, on disk beside its keys and values.

        Only `Graph` is such an index: the others belong to pages, and grow with them. The model
        runs over the context once more; then each layer's graph is built. An index that is there
        with the same settings is kept; one with others, or a damaged one, is replaced. If it is
        interrupted, the context stays as it was.

        Args:
          context: or its id.
          index: `aj.Graph()`. Plans must ask for the same building settings.
          progress: shows bars on stderr when it is a terminal.

        Raises:
          RequestError: another kind of index, or a mesh with a context axis.
          ContextError: the context is not there, or damaged.
          CacheFullError: the context, or its graph once it is built, does not fit into the budget.
          DatabaseError: it cannot be written.
        """
        if not isinstance(index, Graph):
            raise RequestError(
                f"build_index({index!r}): only aj.Graph() is built once and stored; other indexes "
                "are made of pages when a plan first asks them"
            )
        graphs.require_no_context_axis(self.model, "build_index")
        self._catalogue.store.require_writable()
        known = self._catalogue.find(context, "build_index")
        self._catalogue.build_graph(known, index, progress=progress)
        return self._shared(known)

    def remove(self, context: Context | str) -> None:
        """Deletes a stored context; sessions that read it go on.

        Raises:
          ContextError: it is not there, or pinned.
        """
        self._catalogue.remove(self._catalogue.id_of(context, "remove"))

    def check(self, context: Context | str) -> list[str]:
        """Reads a whole stored context and its indexes; every problem found, in words."""
        return list(self._catalogue.store.check(self._catalogue.id_of(context, "check")))

    def stats(self) -> DatabaseStats:
        """What the database holds on disk, of all models and namespaces: contexts, bytes, and how
        many of them are shared; and what is in the pool. A notebook shows it as a table.
        """
        there, pool = self._catalogue.store.stats(), self.pool
        used = (pool.capacity_tokens - pool.free_tokens) * self.token_bytes
        kept = self._catalogue.residency
        beside, beside_host = self._catalogue.index_bytes
        return DatabaseStats(
            **dataclasses.asdict(there),
            bytes_pool=pool.capacity_tokens * self.token_bytes,
            bytes_pool_used=used,
            bytes_beside=beside,
            device_limit=self.budget.device_bytes,
            bytes_beside_host=beside_host,
            bytes_host=kept.nbytes,
            bytes_host_leaves=kept.leaves_nbytes,
            host_limit=kept.limit,
            pages_memory=kept.memory,
            pages_disk=kept.disk,
            bytes_read=kept.bytes_read,
            bytes_verified=kept.bytes_verified,
        )

    def close(self) -> None:
        """Closes its engines, and lets go of the path and the pages; closing twice is allowed."""
        for user in list(self._users):
            user.close()
        self._catalogue.close()

    def close_before(self, user: "Closes") -> None:
        """Has `close` close first what works in threads of its own, if it is still there."""
        self._users.add(user)

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
            f"DB({self.path!r}, {self.model.name}, {len(self._catalogue)} contexts, "
            f"{self.pool.free_tokens:,} of {self.pool.capacity_tokens:,} tokens "
            "free)"
        )

    def prompt(
        self,
        prompt: Any = None,
        messages: Sequence[Message] | None = None,
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
        given = (prompt, messages, document, date)
        return prompts.of(self.model, *given, self.contexts, to_store=to_store)

    def _fetch(self, rows: Sequence[np.ndarray], *, exact: bool = True) -> None:
        """Takes what the shared store knows more of these prompts."""
        for tokens in rows if self._sharing is not None else ():
            self._sharing.fetch(tokens, exact=exact)  # type: ignore[union-attr]

    def _shared(self, context: Context) -> Context:
        """The context, when the shared store has it too."""
        if self._sharing is not None:
            self._sharing.push(context)
        return context

    def _check_length(self, tokens: np.ndarray) -> None:
        if not len(tokens):
            raise RequestError("the prompt has no tokens; give at least one")
        limit = self.model.length_limit
        if len(tokens) > limit:
            raise RequestError(
                f"the prompt has {len(tokens):,} tokens, and {self.model.name} takes up to "
                f"{limit:,}; shorten it, or {self.model.way_to_longer}"
            )

    def _check_room(self, length: int, sequence: PagedSequence, pool: PagePool) -> None:
        """Whether a prompt fits, but for what is read in mapped files."""
        size, room = pool.page_size, pool.capacity_tokens
        in_files = pool.in_files(sequence) // size * size
        if length - in_files > room and pool.device is not None:
            raise CacheFullError(
                f"the prompt has {length - in_files:,} tokens behind {in_files:,} that are read "
                f"where they lie, and beside them there is room for {room:,} on the CPU; store "
                "more of it first (import_context), or leave tier= out"
            )
        if length - in_files > room:
            needed = self.budget.for_tokens(self.model, size, length - in_files)
            behind = f" behind {in_files:,} that are read where they lie" if in_files else ""
            raise CacheFullError(
                f"the prompt has {length - in_files:,} tokens{behind}, and the KV cache holds "
                f"{room:,}; raise {self.budget.setting} to at least "
                f"{needed.device_bytes:,} bytes"
            )
