"""What programs read of mapped pages: whether there is room for it, and an account of it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from alaya_jax.attention.met import tells
from alaya_jax.cache.pool import PagedSequence, PagePool
from alaya_jax.cache.residency import FileAccount
from alaya_jax.errors import CacheFullError
from alaya_jax.index import Block, Sketch
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query.plan import Plan, Plans, of_layer
from alaya_jax.units import nbytes


@dataclasses.dataclass(frozen=True)
class Least:
    """What has to be kept in memory of mapped pages, at least.

    Attributes:
      leaves: bytes of what indexes know of them, all layers.
      data: bytes of keys and values that one layer surely reads, all of them in one program; of the
        layer that reads most.
      plan: of that layer.
    """

    leaves: int
    data: int
    plan: Plan

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.leaves + self.data

    def problem(self, limit: int) -> str | None:
        """Why it may not be kept; None: it may."""
        if self.nbytes <= limit:
            return None
        says = tells(self.plan)
        what = "its window in a layer" if says else "all keys and values of a layer"
        parts = f"{self.data:,} bytes of mapped pages for {what}"
        if self.leaves:
            parts += f" and {self.leaves:,} for what its index knows of all layers"
        way = "" if says else ", or ask a plan that reads few pages (attention=, prefill=)"
        return (
            f"{self.plan} has {parts} in memory at once, and {limit:,} may be kept: give at least "
            f"{self.nbytes:,} bytes ({nbytes(self.nbytes)}){way}"
        )


def least(
    each: Sequence[Plan],
    config: LlamaConfig,
    page_size: int,
    dtype: jax.typing.DTypeLike,
    counts: Sequence[int],
    together: int | None = None,
    page_bytes: int | None = None,
) -> Least:
    """What these plans need, one a layer.

    Args:
      each: the plans.
      config, page_size, dtype: of the pages.
      counts: mapped pages of each sequence.
      together: of all; fewer where sequences share some. None: they share none.
      page_bytes: of a page in a layer; None: they are stored in `dtype`.
    """
    pages = sum(counts) if together is None else together
    token = config.layer_kv_width * np.dtype(dtype).itemsize
    page = page_size * token if page_bytes is None else page_bytes

    def read(plan: Plan) -> int:
        if not tells(plan):
            return pages
        window: Any = getattr(plan.query, "window", plan.query)
        most = -(-int(window.sink) // page_size) + -(-int(window.recent) // page_size) + 1
        return min(pages, sum(min(most, count) for count in counts))

    leaves = sum(
        plan.index.page_bytes(config, page_size, dtype)
        for plan in each
        if plan.retrieves and isinstance(plan.index, Sketch | Block)
    )
    plan = max(each, key=read)
    return Least(pages * leaves, read(plan) * page, plan)


class Reading:
    """The mapped pages of some sequences, read by some plans, layer by layer.

    Where no sequence has any, nothing is done.
    """

    def __init__(self, pool: PagePool, sequences: Sequence[PagedSequence], plans: Plans):
        """Args:
        pool: that they are in.
        sequences: of one batch; the mapped pages are all of one set of files.
        plans: how attention is answered.
        """
        self._pool, self._sequences = pool, sequences
        layers = range(pool.config.num_hidden_layers)
        self._each = [of_layer(plans, i) for i in layers]
        self._mapped = [(s, s.host) for s in sequences if s.host is not None]

    @property
    def _account(self) -> FileAccount:
        return self._mapped[0][1].account

    @property
    def _limit(self) -> int | None:
        """Bytes of mapped files that may be kept in memory."""
        return self._account.residency.room if self._mapped else None

    @property
    def _heads(self) -> int:
        """K."""
        return self._pool.config.num_key_value_heads

    @functools.cached_property
    def _count(self) -> int:
        """Mapped pages of all sequences."""
        lists = [s.pages[: self._pool.mapped_pages(s)] for s, _ in self._mapped]
        return len(np.unique(np.concatenate(lists)))

    def _least(self) -> "Least":
        pool = self._pool
        shape = pool.config, pool.page_size, pool.dtype
        counts = [self._pool.mapped_pages(s) for s, _ in self._mapped]
        return least(self._each, *shape, counts, self._count, self._account.page_bytes)

    def require_room(self) -> None:
        """Raises CacheFullError where what one layer reads at once may not be kept in memory."""
        limit = self._limit
        if limit is not None and (problem := self._least().problem(limit)):
            setting = self._account.residency.setting
            raise CacheFullError(f"{problem} ({setting} bounds what is kept)")

    @property
    def most_layers(self) -> int | None:
        """Layers whose pages may be kept together, and so read by one program; None: any number."""
        limit = self._limit
        if limit is None:
            return None
        found = self._least()
        return max(1, (limit - found.leaves) // found.data) if found.data else None

    def before(self, first: int, layers: int, running: jax.Array | None = None) -> None:
        """Layers are read next. Where a plan does not say which pages it meets, it may be any: room
        is made for all, when what runs now has ended, and they are compared with their checksums,
        once.

        Args:
          first, layers: which.
          running: a result of the newest program.

        Raises:
          ContextError: a page is damaged.
        """
        some = [i for i in range(first, first + layers) if not tells(self._each[i])]
        if not some or not self._mapped:
            return
        residency = self._account.residency
        since = residency.now
        for layer in some:
            for sequence, host in self._mapped:
                there = self._pool.mapped_pages(sequence)
                held = -(-sequence.length // self._pool.page_size)
                host.meet(layer, there, in_pool=self._heads * (held - there))
        residency.make_room(since=since, wait=lambda: jax.block_until_ready(running))
        for layer in some:
            for _, host in self._mapped:
                host.verify(layer)

    def after(self, first: int, met: np.ndarray) -> None:
        """Compares pages that layers say they met with their checksums, once, and lets go of what
        was met longest ago: room is kept for as much as was new.

        Args:
          first: of the layers.
          met: uint8 [L', B, K, N]; see `Counts`.

        Raises:
          ContextError: a page is damaged.
        """
        new = 0
        for i, one in enumerate(met):
            for b, sequence in enumerate(self._sequences):
                if sequence.host is not None and tells(self._each[first + i]):
                    there = self._pool.mapped_pages(sequence)
                    held = int(np.count_nonzero(one[b, :, there:]))
                    new += sequence.host.verify_met(first + i, one[b, :, :there], in_pool=held)
        if self._mapped:
            residency = self._account.residency
            residency.make_room(spare=min(new, (residency.room or 0) // 2))
