"""A session: one running request (or a batch), its tokens, and its pages in the pool."""

import contextlib
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from jaxtyping import Array, Float

from alaya_jax.cache.pool import PagedSequence, PagePool, uninterrupted
from alaya_jax.contexts.context import Context
from alaya_jax.errors import RequestError
from alaya_jax.explain.account import Account
from alaya_jax.explain.explanation import Explanation
from alaya_jax.explain.report import last_plans, report
from alaya_jax.model import Model
from alaya_jax.optimizer.situation import choose_for, choose_prefill_for
from alaya_jax.query import Full
from alaya_jax.query.auto import Auto
from alaya_jax.query.origin import Origin, Way
from alaya_jax.query.plan import Attention, Plans, plan_for
from alaya_jax.runtime import layerwise
from alaya_jax.runtime.batch import Batch
from alaya_jax.runtime.output import Output
from alaya_jax.settings import methods_under_own_settings


@methods_under_own_settings
class Session:
    """The connection between stored contexts and one running request (AlayaDB, section 5).

    Made by `DB.create_session`. Two ways to use it:

    - `aj.generate(session, rest)` runs the model of the database;
    - a model of your own calls `update` and `attention` in each layer.

    Pages are given back by `close`, at the end of a `with` block, or when the session is collected.
    One thread at a time may use a session; threads may share its database.

    Attributes:
      batch: its sequences, their tokens and pages.
      contexts: the context of each sequence, or None.
      account: what was read of them.
    """

    def __init__(
        self,
        batch: Batch,
        contexts: list[Context | None],
        *,
        batched: bool,
        dated: str = "",
    ):
        """Made by the database.

        Args:
          batch: taken over: its sequences, which hold what `contexts` share.
          contexts: of each sequence, or None.
          batched: whether a list of prompts was given.
          dated: what the chat template printed for the time, where it does.
        """
        self.batch = batch
        self.contexts = contexts
        self.batched = batched
        self.dated = dated
        self.account = Account(batch.pool, batch.pool.page_size)
        self.outputs = [Output() for _ in contexts]
        """What each sequence said since it was last given tokens."""

    @property
    def model(self) -> Model:
        """The model of the database."""
        return self.batch.model

    @property
    def pool(self) -> PagePool:
        """Where its pages are."""
        return self.batch.pool

    @property
    def reused(self) -> list[int]:
        """Tokens of each sequence that came from a stored context."""
        return self.batch.reused

    @property
    def origins(self) -> list[Origin]:
        """How the keys and values of each sequence were computed."""
        return self.batch.origins

    @property
    def sequences(self) -> list[PagedSequence]:
        """Where each sequence is in the pool.

        Raises:
          RequestError: the session is closed.
        """
        return self.batch.sequences

    @property
    def batch_size(self) -> int:
        """B."""
        return self.batch.size

    @property
    def lengths(self) -> list[int]:
        """Tokens in the cache, of each sequence."""
        return self.batch.lengths

    @property
    def length(self) -> int:
        """Tokens in the cache; of the longest sequence of a batch."""
        return max(self.lengths)

    @property
    def tokens(self) -> list[np.ndarray]:
        """Ids of the tokens in the cache, of each sequence; shorter where `update` gave none."""
        return self.batch.tokens

    @property
    def context(self) -> Context | None:
        """The context that the (first) sequence was opened on."""
        return self.contexts[0]

    def rows(self, tokens: Any) -> list[np.ndarray]:
        """One array of new token ids for each sequence, what is pending in front.

        Raises:
          RequestError: not one list for each sequence, or ids outside the vocabulary.
        """
        rows = list(tokens) if self.batched else [tokens]
        rows = rows or [()] * self.batch_size  # nothing new, in a batch
        if len(rows) != self.batch_size:
            raise RequestError(
                f"the session has {self.batch_size} sequences and {len(rows)} lists of tokens were "
                "given"
            )
        checked = [self.model.check_tokens(row) for row in rows]
        return [
            np.concatenate([np.asarray(p, np.int32), row])
            for p, row in zip(self.batch.pending, checked, strict=True)
        ]

    def prefill(
        self,
        tokens: Any,
        attention: Attention | None = None,
        *,
        on_chunk: Callable[[int], None] | None = None,
    ) -> Float[Array, "B V"]:
        """Runs the model over new tokens and keeps their keys and values.

        Args:
          tokens: ids of the new tokens (a list of such for a batch; lengths may differ, and be 0
            for a sequence that has nothing new, whose logits are then meaningless).
          attention: what the new tokens attend to; default `Full()`.
          on_chunk: called with the number of tokens done, after each chunk.

        Returns:
          logits of the last token of each sequence, float32.

        Raises:
          RequestError: longer than the model allows.
          CacheFullError: no room for the tokens, or for an index that is asked; nothing was
            computed.
        """
        rows = self.rows(tokens)
        if not max(len(row) for row in rows):
            raise RequestError("prefill: there are no tokens to run the model over")
        longest = max(n + len(row) for n, row in zip(self.lengths, rows, strict=True))
        plans = self.plans(attention, longest, prefill=True)
        self.batch.make_room([len(row) for row in rows], plans)
        on_read = self.account.on_read("prefill", plans)
        passed, _ = self.batch.feed(rows, plans, on_read, on_chunk)
        return self.batch.stack.logits(passed)

    def plans(self, attention: Attention | None, length: int, prefill: bool = False) -> Plans:
        """What answers `attention`, default `Full()`, in sequences of up to so many tokens.

        A prefill reads each key for many queries at once: `Auto` has it read every key, or blocks
        of them, as its `prefill` says.

        Raises:
          RequestError, ContextError: a plan asks for a graph, and a sequence has none.
          CacheFullError: there is no room for a graph.
        """

        def choose(auto: Auto) -> Plans:
            if prefill:
                self.account.prefill = choose_prefill_for(auto, self.batch, length)
                return self.account.prefill.plan
            self.account.choice = choose_for(auto, self.batch, length)
            return self.account.choice.plans

        asked = Full() if attention is None else attention
        plans = plan_for(
            asked,
            self.model.config,
            length,
            choose,
            lambda: self.batch.indexes.learnt is not None,
        )
        self.batch.require_graphs(plans)
        return plans

    def both_plans(
        self, attention: Attention | None, prefill: Attention | None, longest: int, read: int
    ) -> tuple[Plans, Plans]:
        """What answers decoding and the prefill before it; see `plans`, also for what it raises.

        Args:
          attention: for decoding, in sequences of up to `longest` tokens.
          prefill: for the prefill, which ends with `read` tokens; None: `Full()`, or what an
            `Auto` for decoding says.
        """
        if prefill is None and isinstance(attention, Auto):
            prefill = attention
        return self.plans(attention, longest), self.plans(prefill, read, prefill=True)

    def accept(self, b: int, token: int, way: Way) -> None:
        """Records a generated token of sequence `b`; the one before it is in the cache now."""
        with uninterrupted():
            self.batch.accept(b, token, way)
            self.outputs[b].ids.append(token)

    def update(
        self,
        q: Any,
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K D"],
        layer: int,
        *,
        return_kv: bool = False,
    ) -> tuple[Array | None, Array | None]:
        """Appends keys and values of T new tokens of one layer (AlayaDB, Table 2).

        Call it once in each layer, then `attention` for that layer. Token ids are not known this
        way: pass them to `DB.store`.

        Args:
          q: queries of the new tokens, [B, T, H, D], or None; an index may learn from them.
          k: keys, after RoPE.
          v: values.
          layer: from 0.
          return_kv: give back all keys and values of the (single) sequence.

        Returns:
          k, v of the whole sequence [K, n, D] with `return_kv`, else (None, None).

        Raises:
          RequestError: wrong shapes or layer, or a generated token is still to be fed.
          CacheFullError: no room.
        """
        del q
        return layerwise.update(self.batch, k, v, layer, return_kv)

    def attention(
        self, q: Float[Array, "B T H D"], layer: int, query: Attention | None = None
    ) -> Float[Array, "B T H D"]:
        """Attention of the last T tokens of one layer, after `update` (AlayaDB, Table 2).

        Args:
          q: rotated queries of the T tokens that were appended last, not scaled.
          layer: from 0.
          query: a query or a plan; default `Full()`.

        Raises:
          RequestError: wrong shape or layer, or more tokens than there are.
          CacheFullError: there is no room for the indexes that this and the layers behind it ask.
        """
        t = layerwise.queries(self.batch, q, layer)
        plans = self.plans(query, self.length + t, prefill=t > 1)
        on_read = self.account.on_read("attention", plans)
        return layerwise.attention(self.batch, q, layer, plans, on_read)

    def fork(self) -> "Session":
        """A second session with the same tokens. Pages are shared until one of the two writes."""
        batch, contexts = self.batch.fork(), list(self.contexts)
        other = Session(batch, contexts, batched=self.batched, dated=self.dated)
        other.outputs = [output.copy() for output in self.outputs]
        return other

    def __copy__(self) -> "Session":
        return self.fork()

    def __deepcopy__(self, memo: Any) -> "Session":
        return self.fork()

    def __reduce__(self) -> Any:
        raise RequestError(
            "a session cannot be pickled: its keys and values are in this process's memory; "
            "db.store(session), and in the other process open the database and call "
            "create_session with its tokens"
        )

    def explain(
        self,
        analyze: bool = False,
        attention: Attention | None = None,
        *,
        sequence: int = 0,
    ) -> Explanation:
        """What this session asked of its keys and what was really read, by phase and layer.

        Args:
          analyze: also runs the last cached token's attention again, each layer timed and held
            against full attention: the true share of the mass, the error of the output, the keys
            attended to. The cache is only read.
          attention: the plan to show and to analyze; default what decoding did last (or the
            prefill, or `Full()`).
          sequence: of a batch, which to analyze.

        Raises:
          RequestError: there is nothing to analyze, or the session is closed.
          PlanError: what an `Auto` asks cannot be had.
        """
        if not self.batch.is_open:
            if analyze or attention is not None:
                raise RequestError("the session is closed; what it read is explain() without more")
            return self._explanation
        with self.pool.lock if analyze else contextlib.nullcontext():
            plans = last_plans(self.account)
            planned = attention is not None or plans is None
            return report(
                self.batch,
                self.account,
                [c.id if c else None for c in self.contexts],
                self.plans(attention, self.length + 1) if planned or plans is None else plans,
                planned=planned,
                analyzed=sequence if analyze else None,
            )

    def kv(self, layer: int) -> Any:
        """Keys and values of a layer, as they are in the cache: numpy (k, v), each [K, n, D].

        Keys are those after RoPE; n counts the tokens in the cache: the last one that was generated
        is not among them yet. They are copies, for reading only.

        Args:
          layer: from 0.

        Returns:
          (k, v) in the model's dtype; a list of such for a batch.

        Raises:
          RequestError: there is no such layer, or the session is closed.
        """
        layers = self.model.config.num_hidden_layers
        if not isinstance(layer, int | np.integer) or not 0 <= layer < layers:
            raise RequestError(f"kv({layer!r}): the model has layers 0 to {layers - 1}")
        pairs = [self.pool.read(sequence, int(layer)) for sequence in self.sequences]
        return pairs if self.batched else pairs[0]

    def close(self) -> None:
        """Gives the pages back; closing twice is allowed."""
        if self.batch.is_open:
            self._explanation = self.explain()
        self.batch.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if not self.batch.is_open:
            return "Session(closed)"
        return f"Session({self.model.name}, lengths {self.lengths}, reused {self.reused})"
