"""Memory that a database may use, and the pages that fit into it."""

import dataclasses
import math
from typing import Any, Protocol

import numpy as np

from alaya_jax.errors import RequestError
from alaya_jax.index import Block, Graph, Index, Sketch
from alaya_jax.model import Model
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query.plan import LEARNT_SKETCH
from alaya_jax.sharding import memory_of
from alaya_jax.units import bytes_of

Indexes = int | str | Index | tuple[Index, ...] | None
"""What `Budget.indexes` may be."""


class OfKeys(Protocol):
    """Whose keys and values these are: a model, or one that is not loaded."""

    @property
    def config(self) -> LlamaConfig:
        """Its architecture."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of its keys and values."""
        ...


@dataclasses.dataclass(frozen=True)
class Budget:
    """Memory the database may use.

    Attributes:
      device: for the KV pages of all contexts in use and all sessions, and for what indexes and
        graphs know of them, over all devices that the pages are split over; bytes, or a string such
        as "8GiB". What a mesh holds in copies (one for each step of its `data` axis) is counted
        once.
      host: for what is read where it lies, in files that are mapped: so much of them, and of what
        indexes know of their pages, is kept in memory by this process; what was read longest ago
        is let go of, pages of pinned contexts after others, and what indexes know last. Bytes, a
        string, or None: as much as the system keeps.
      indexes: of `device`, what is left beside the pages for indexes and graphs. None: as much as
        the sketch of a plan that names no index takes for all pages, so that such a plan always has
        room. An index, or a tuple of those that open sessions ask at once: as much as these take
        (`Flat()`: nothing; `Graph()`: that of one context as large as the pool). Or bytes, or a
        string.

    Raises:
      RequestError: `host` is no size, or `indexes` nothing of these.
    """

    device: int | str = "2GiB"
    host: int | str | None = None
    indexes: Indexes = None

    def __post_init__(self):
        if self.host is not None:
            bytes_of(self.host, "Budget(host=...)")
        if self._asked is None:
            _ = self._index_bytes

    @classmethod
    def for_pages(
        cls,
        model: OfKeys,
        count: int,
        page_size: int = 16,
        *,
        host: int | str | None = None,
        indexes: Indexes = None,
    ) -> "Budget":
        """The least for so many pages and the indexes beside them.

        Args:
          model: whose keys and values.
          count: of pages, in all parts of a mesh together; of each part one belongs to nobody.
          page_size: Z, tokens a page, as the database has it.
          host, indexes: see the class.
        """
        kind = cls(1, host, indexes)
        page, beside = kind._page_bytes(model, page_size)
        return dataclasses.replace(kind, device=count * (page + beside) + kind._index_bytes)

    @property
    def device_bytes(self) -> int:
        """`device` in bytes.

        Raises:
          RequestError: not a size.
        """
        return bytes_of(self.device, "Budget(device=...)")

    @property
    def host_bytes(self) -> int | None:
        """`host` in bytes; None: no bound."""
        return None if self.host is None else bytes_of(self.host, "Budget(host=...)")

    @property
    def setting(self) -> str:
        """How errors name `device`."""
        return f"Budget(device={self.device!r})"

    @property
    def host_setting(self) -> str:
        """How errors name `host`."""
        return f"Budget(host={self.host!r})"

    def pages(self, model: Model, page_size: int) -> int:
        """How many pages of a model's keys and values fit, with room for indexes beside them.

        Raises:
          RequestError: none, or it is more memory than there is.
        """
        page, beside = self._page_bytes(model, page_size)
        count = (self.device_bytes - self._index_bytes) // (page + beside)
        shards = model.rules.page_shards(model.mesh)
        if count < 2 * shards:  # of each part one belongs to nobody
            parts = "" if shards == 1 else f" for each of {shards} devices"
            least = self.for_pages(model, 2 * shards, page_size, indexes=self.indexes)
            given = f"and indexes get {self.indexes!r} of it"
            index = given if self._index_bytes else f"and an index beside it {beside:,}"
            raise RequestError(
                f"{self.setting} holds no page{parts}: a page of {page_size} tokens of "
                f"{model.name} takes {page:,} bytes {index}, and one page{parts} stays empty; "
                f"raise the budget to at least {least.device_bytes:,} bytes"
            )
        there = memory_of(model.mesh)
        if there is not None and self.device_bytes > there:  # else it fails when first used
            raise RequestError(
                f"{self.setting} is {self.device_bytes:,} bytes, and there are {there:,} in all, "
                "weights included; give less"
            )
        return count

    def for_tokens(self, model: Model, page_size: int, tokens: int) -> "Budget":
        """The least of its kind whose pool has room for a sequence of so many tokens."""
        shards = model.rules.page_shards(model.mesh)
        in_part = math.ceil(math.ceil(tokens / page_size) / shards) + 1  # one belongs to nobody
        return self.for_pages(
            model, in_part * shards, page_size, host=self.host, indexes=self.indexes
        )

    @property
    def _asked(self) -> tuple[Index, ...] | None:
        """The indexes that there is to be room for; None: `indexes` is a size."""
        if self.indexes is None:
            return ()
        each = self.indexes if isinstance(self.indexes, tuple) else (self.indexes,)
        named = tuple(index for index in each if isinstance(index, Index))
        return named if len(named) == len(each) else None

    @property
    def _index_bytes(self) -> int:
        """`indexes`, if it is a size; else 0."""
        size: Any = self.indexes
        return bytes_of(size, "Budget(indexes=...)") if self._asked is None else 0

    def _page_bytes(self, model: OfKeys, page_size: int) -> tuple[int, int]:
        """Bytes of a page in all layers, and of what indexes know of it, where they go by pages."""
        config = model.config
        page = page_size * config.kv_width * np.dtype(model.dtype).itemsize

        def of(index: Index) -> int:
            if isinstance(index, Block | Sketch):
                return index.page_bytes(config, page_size, model.dtype)
            return _graph_bytes(config, index, page_size) if isinstance(index, Graph) else 0

        if self.indexes is None:  # the larger, so that a calibration changes no pool
            usual = (index for index in (Sketch(), LEARNT_SKETCH) if index.fits(config))
            return page, config.num_hidden_layers * max(map(of, usual), default=0)
        return page, config.num_hidden_layers * sum(map(of, self._asked or ()))


def _graph_bytes(config: LlamaConfig, index: Graph, tokens: int) -> int:
    """Bytes of one layer of a graph's so many tokens, of a context of many, with the rows that it
    may be padded with: a quarter more.
    """
    return 5 * config.num_key_value_heads * index.degree * tokens
