"""Memory that a database may use, and the pages that fit into it."""

import dataclasses

from alaya_jax.errors import RequestError
from alaya_jax.model import Model
from alaya_jax.sharding import memory_of
from alaya_jax.units import bytes_of


@dataclasses.dataclass(frozen=True)
class Budget:
    """Memory the database may use.

    Attributes:
      device: for the KV pages of all contexts in use and all sessions, over all devices that the
        pages are split over; bytes, or a string such as "8GiB". What a mesh holds in copies (one
        for each step of its `data` axis) is counted once.
      host: for what is read where it lies, in files that are mapped: so much of them, and of what
        indexes know of their pages, is kept in memory by this process; what was read longest ago
        is let go of, pages of pinned contexts after others, and what indexes know last. Bytes, a
        string, or None: as much as the system keeps.

    Raises:
      RequestError: `host` is no size.
    """

    device: int | str = "2GiB"
    host: int | str | None = None

    def __post_init__(self):
        if self.host is not None:
            bytes_of(self.host, "Budget(host=...)")

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
        """How many pages of a model's keys and values fit.

        Raises:
          RequestError: none, or it is more memory than there is.
        """
        page_bytes = model.token_bytes * page_size
        count = self.device_bytes // page_bytes
        shards = model.rules.page_shards(model.mesh)
        if count < 2 * shards:  # of each part one belongs to nobody
            parts = "" if shards == 1 else f" for each of {shards} devices"
            raise RequestError(
                f"{self.setting} holds no page{parts}: a page of {page_size} tokens of "
                f"{model.name} takes {page_bytes:,} bytes, and one{parts} stays empty; raise the "
                f"budget to at least {2 * shards * page_bytes:,} bytes"
            )
        there = memory_of(model.mesh)
        if there is not None and self.device_bytes > there:  # else it fails when first used
            raise RequestError(
                f"{self.setting} is {self.device_bytes:,} bytes, and there are {there:,} in all, "
                "weights included; give less"
            )
        return count
