"""The account that a session keeps: what was read, and what `Auto` chose."""

import functools
from typing import Any

import numpy as np

from alaya_jax.attention.counts import Counts
from alaya_jax.cache.residency import PagesMet
from alaya_jax.explain.reads import Reads
from alaya_jax.model import Model
from alaya_jax.optimizer.choice import PlanChoice
from alaya_jax.optimizer.prefill import PrefillChoice
from alaya_jax.query.plan import Plans
from alaya_jax.runtime.batch import OnRead


class Account:
    """What a session read and why.

    Attributes:
      reads: phase ("prefill", "decode", "attention") -> what its last plans read.
      choice: what `Auto` chose last.
      prefill: the same for a prefill.
    """

    def __init__(self, model: Model, page_size: int):
        """Starts at nothing."""
        self._model, self._page_size = model, page_size
        self.reads: dict[str, Reads] = {}
        self.choice: PlanChoice | None = None
        self.prefill: PrefillChoice | None = None

    def on_read(self, phase: str, plans: Plans) -> OnRead:
        """What is told of programs that answer by these plans; see `count`."""
        return functools.partial(self.count, phase, plans)

    def count(
        self,
        phase: str,
        plans: Plans,
        counts: Counts,
        lengths: list[int],
        new: Any,
        tokens: int = 1,
        met: PagesMet | None = None,
    ) -> None:
        """Adds what a program read.

        Args:
          phase, plans: whose account; other plans than before begin another.
          counts: [L, B, H].
          lengths: tokens of each sequence before it.
          new: new tokens of each.
          tokens: of each sequence that the program took at once.
          met: pages, where some are mapped.
        """
        reads = self.reads.get(phase)
        if reads is None or not reads.is_of(plans):
            reads = Reads(plans, self._model, self._page_size, tokens)
            self.reads[phase] = reads
        # Token i of n new ones sees the `length` before it, the i before it, and itself.
        visible = sum(
            int(n) * length + int(n) * (int(n) + 1) // 2
            for length, n in zip(lengths, new, strict=True)
        )
        reads.add(counts, visible, int(np.sum(new)))
        if met is not None:
            reads.met.add(met)
