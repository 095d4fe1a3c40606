"""Decoding under way: one step after another, each dispatched without waiting for the one before.

A token goes from the end of a step to the start of the next on the device. So the host may ask for
a step before it has read what the last one chose, and the device need not wait for the host.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from alaya_jax.cache import PageTable
from alaya_jax.cache.pool import PagePool
from alaya_jax.runtime.programs import Fed, Going, Passed, Row
from alaya_jax.runtime.sampling.sampler import Processors, SamplerState
from alaya_jax.runtime.stack import Chain, Stack

COVER = 16
"""Steps after which indexes are asked again what they know: pages fill as tokens come."""


class Decoding:
    """A batch that decodes. One thread at a time may use it."""

    def __init__(
        self,
        stack: Stack,
        pool: PagePool,
        chain: Callable[[], Chain],
        end_ids: np.ndarray,
        sampling: tuple[Processors, SamplerState],
    ):
        """Args:
        stack: the model's layers.
        pool: where the sequences are.
        chain: the layers, with what indexes know of the sequences now.
        end_ids: ids that end each sequence, int32 [B, M], padded with -1.
        sampling: see `sampler.init_sampler`.
        """
        self._stack, self._pool, self._make = stack, pool, chain
        self._processors, self._sampler = sampling
        self._end_ids = stack.put(end_ids)
        self._chain: Chain | None = None
        self._account: tuple[int, ...] | None = None
        self._mask: Any = None
        self._steps = 0
        self._allowed = np.ones(len(end_ids), bool)
        self._allowed_there = stack.put(self._allowed)

    def ahead(self, table: PageTable) -> contextlib.AbstractContextManager[None]:
        """Around a prefill that steps will follow: if it takes long, their programs are compiled
        beside it.

        Args:
          table: pages of all tokens to come.
        """
        with self._pool.lock:
            chain = self._make()
        self._account = chain.account(table)
        return self._stack.ahead(self._pool.abstract, chain, table, 1)

    def first(self, passed: Passed, fed: Fed, table: PageTable) -> Row:
        """The token behind a prefill.

        Args:
          passed, fed: its last chunk.
          table: pages of all tokens to come.
        """
        batch = fed.count.shape[0]
        going = Going(
            np.zeros((batch, 1), np.int32),  # type: ignore[arg-type]
            np.ones(batch, bool),  # type: ignore[arg-type]
            fed.table.length,
            fed.count,
            self._sampler,
        )
        self._passed = self._stack.start(batch, passed, self._account)
        self._going, self._table = self._stack.put(going), self._stack.put(table)
        self._x = self._stack.between(batch, 1)
        return self._end()

    def resume(self, token: np.ndarray, running: np.ndarray, table: PageTable) -> None:
        """Goes on behind tokens that are known: the next step feeds them.

        Args:
          token: of each sequence, int32 [B].
          running: whether it goes on, bool [B]; one that does not is fed nothing.
          table: lengths are those before these tokens.
        """
        batch, count = len(token), running.astype(np.int32)
        state: Any = token[:, None], running, table.length, count, self._sampler
        self._passed = self._stack.start(batch, None, self._account)
        self._going, self._table = self._stack.put(Going(*state)), self._stack.put(table)
        self._x = self._stack.between(batch, 1)

    def place(self, table: PageTable) -> None:
        """The sequences have other pages from the next step on; lengths are not looked at."""
        self._table = self._stack.put(table)

    def allow(self, running: np.ndarray) -> None:
        """Which sequences may go on behind the next step, bool [B]."""
        if not np.array_equal(running, self._allowed):
            self._allowed, self._allowed_there = running, self._stack.put(running)

    def mask(self, allowed: np.ndarray) -> None:
        """Which ids each sequence may choose at the end of the next step, uint32 [B, W]; for a
        sampler that has a mask.
        """
        self._mask = self._stack.put(allowed)

    def step(self) -> Row:
        """Feeds each running sequence its last token and chooses the next; does not wait for it."""
        stack, going = self._stack, self._going
        fed = Fed(going.token, going.count, dataclasses.replace(self._table, length=going.length))
        with self._pool.lock:
            chain = self._current()
            with self._pool.lend() as lent:
                self._x, self._passed = stack.layers(lent, chain, self._x, self._passed, fed)
                row = self._end()
                lent.result = row.token
        self._steps += 1
        return row

    def _end(self) -> Row:
        if self._mask is not None:
            sampler = dataclasses.replace(self._going.sampler, mask=self._mask)
            self._going, self._mask = dataclasses.replace(self._going, sampler=sampler), None
        row, self._passed, self._going = self._stack.end(
            self._passed, self._going, self._end_ids, self._allowed_there, self._processors
        )
        return row

    def _current(self) -> Chain:
        """The layers, with what indexes know now; whoever has them learn a page donates them."""
        if self._chain is None or self._chain.is_lost or self._steps % COVER == 0:
            self._chain = self._make()
        return self._chain


def read(row: Row) -> Any:
    """Token, log-probability, alternatives, length and count of a step, on the host; waits for it.

    Counts stay on the device: they are read when they are asked for.
    """
    return jax.device_get((row.token, row.logprob, row.alternatives, row.length, row.count))
