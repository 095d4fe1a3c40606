"""Which stored contexts have their pages in the pool."""

from alaya_jax.cache.pool import PagePool, Sequence
from alaya_jax.contexts.context import Context
from alaya_jax.errors import ContextError
from alaya_jax.storage import DirectoryStore


class Residents:
    """The contexts that are in memory. Where the pool is full, those used longest ago leave it."""

    def __init__(self, contexts: dict[str, Context], pool: PagePool, store: DirectoryStore):
        """Of the contexts of a database, which may change."""
        self._contexts, self._pool, self._store = contexts, pool, store
        self._clock = 0
        pool.evict = self.evict

    def share(self, context: Context, length: int) -> Sequence:
        """A share of the first tokens of a context, read from disk if they are not in memory.

        Raises:
          ContextError: the stored context is damaged.
          CacheFullError: there is no room.
        """
        self._touch(context)
        resident = context._resident
        if resident is None or resident.length < length:
            loaded = Sequence()
            try:
                self._pool.reserve(loaded, length)
                for layer in range(len(self._pool.kv.k)):
                    k, v = self._store.read_kv(context.id, layer, 0, length)
                    self._pool.write(loaded, layer, k, v)
            except BaseException as error:
                self._pool.release(loaded)
                if isinstance(error, ContextError):
                    context.problem = str(error)
                raise
            loaded.length = length
            self.drop(context)
            context._resident = loaded
        assert context._resident is not None
        return self._pool.share(context._resident, length)

    def keep(self, context: Context, sequence: Sequence) -> None:
        """Makes a context resident in the pages of a sequence that holds its tokens."""
        if context._resident is None:
            context._resident = self._pool.share(sequence, sequence.length)
            self._touch(context)

    def drop(self, context: Context) -> None:
        """Gives back a context's pages and graph; it stays on disk."""
        context._graph = None
        if context._resident is not None:
            self._pool.release(context._resident)
            context._resident = None

    def evict(self) -> bool:
        """Drops the context that was used longest ago; False where none is in memory."""
        resident = [c for c in self._contexts.values() if c._resident is not None]
        if not resident:
            return False
        self.drop(min(resident, key=lambda c: c._used))
        return True

    def _touch(self, context: Context) -> None:
        self._clock += 1
        context._used = self._clock
