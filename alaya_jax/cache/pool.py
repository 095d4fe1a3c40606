"""The pool of pages that all sessions and contexts of a database share: device arrays and their
owners.

The one place where the cache pytree changes hands: every compiled program that donates it goes
through `PagePool.lend`. And the one place that knows when a page's contents change: whoever writes
has reserved the page (`PagePool.reserve`), which gives it a new generation.
"""

import atexit
import collections
import contextlib
import dataclasses
import functools
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alaya_jax import cache
from alaya_jax.cache import UNUSED, PageAllocator, PagedKV, PageTable
from alaya_jax.cache.tables import bucket, table_width
from alaya_jax.cache.tiers import HostPool, Pool, joined
from alaya_jax.errors import CacheFullError, DatabaseError
from alaya_jax.models.config import LlamaConfig
from alaya_jax.pallas_kernels.dispatch import Target, target_of
from alaya_jax.settings import for_other_threads
from alaya_jax.sharding import ShardingRules, laid, whole

TRANSFER_WIDTH = 64
"""Pages of the smallest transfer to or from the host, larger ones are this times a power of two."""


_under_way: collections.deque[jax.Array] = collections.deque(maxlen=4)
"""A small array from the result of each of the newest programs."""


@atexit.register
def _let_programs_end() -> None:
    """A process that ends while a program runs is aborted by JAX's runtime (SIGABRT)."""
    for array in _under_way:
        with contextlib.suppress(RuntimeError):  # donated since: to a newer one
            array.block_until_ready()


def _in_two_threads(function: Callable[[int], jax.Array], items: range) -> list[jax.Array]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(for_other_threads(function), items))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts Ctrl-C off until the block ends, for what must happen whole: an interrupt between
    donating the cache and getting it back would lose every sequence.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])


@dataclasses.dataclass
class PagedSequence:
    """One sequence's place in the pool. Owned by a session or a context.

    Attributes:
      pages: ids of the pages it holds a reference to, in order; may reach past `length`. Those from
        P on, the first ones of a sequence, are pages of `host`, and are never written to.
      length: tokens that are valid.
      host: pages in mapped files; None: it has none.
    """

    pages: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    length: int = 0
    host: HostPool | None = None


@dataclasses.dataclass
class Lent:
    """The cache in the hands of programs, which donate it, all of it or the layers they work on.

    Attributes:
      kv: the cache as the newest program gave it back.
      result: something small that the newest program made beside it.
    """

    kv: PagedKV
    result: jax.Array | None = None


class PagePool:
    """Device pages and the host's accounts of them.

    Threads may share it: they take turns, a call at a time. Where one call gives what the next one
    takes (an index, then the program that reads it), hold `lock` around both.
    """

    def __init__(
        self,
        config: LlamaConfig,
        dtype: jax.typing.DTypeLike,
        num_pages: int,
        page_size: int,
        setting: str,
        *,
        where: Any = None,
        rules: ShardingRules | None = None,
        evict: Callable[[], bool] = lambda: False,
    ):
        """Args:
        config: of the model whose keys and values these are.
        dtype: theirs.
        num_pages: P, of which whole shards are used.
        page_size: Z.
        setting: the one to name when the pool is exhausted.
        where: pages lie: a mesh, a device, or None, the default device.
        rules: how, on a mesh.
        evict: called when pages run out: frees some, and says whether it could.
        """
        self.config, self.dtype = config, dtype
        self.mesh: Mesh | None = where if isinstance(where, Mesh) else None
        self.device: Any = None if isinstance(where, Mesh) else where
        self.rules = rules or ShardingRules()
        self.shards = self.rules.page_shards(self.mesh)
        self._place = self.rules.pool(self.mesh)
        self.page_size = page_size
        self.num_pages = num_pages - num_pages % self.shards
        self._setting = setting
        self._allocator = PageAllocator(self.num_pages, page_size, setting, self.shards)
        self.lock = threading.RLock()
        self._returned: collections.deque[np.ndarray] = collections.deque()
        """Pages given back and not yet counted as free. A session may be collected at any moment,
        in any thread, and must not wait for the lock then.
        """
        self._kv: PagedKV | None = None
        self._coming: Future[PagedKV] | None = None
        self._generations = np.ones(self.num_pages, np.int64)
        self._evict = evict

    @property
    def kv(self) -> PagedKV:
        """The cache; allocated when first needed."""
        if self._kv is None:
            self.prepare()
            with self.within_memory("the pages of the KV cache"):
                coming, self._coming = self._coming, None
                self._kv = self._create() if coming is None else coming.result()
        if any(pool.is_deleted() for pool in (*self._kv.k, *self._kv.v)):
            raise DatabaseError(
                "the KV cache was lost when a program was interrupted; open the database again "
                "(stored contexts are safe)"
            )
        return self._kv

    @property
    def allocated(self) -> bool:
        """Whether the cache is."""
        return self._kv is not None

    @property
    def abstract(self) -> PagedKV:
        """The cache's shapes and types."""
        heads = self.config.num_key_value_heads
        shape = heads, self.num_pages, self.page_size, self.config.head_dim
        layers: Any = (jax.ShapeDtypeStruct(shape, self.dtype),) * self.config.num_hidden_layers
        return PagedKV(layers, layers)

    def prepare(self) -> None:
        """Begins to allocate the cache while the caller does something else: on a CPU it takes a
        second for 2 GiB.
        """
        with self.lock:
            if self._kv is None and self._coming is None and self.mesh is None:
                thread = ThreadPoolExecutor(1)
                self._coming = thread.submit(for_other_threads(self._create), _in_two_threads)
                thread.shutdown(wait=False)

    def _create(self, each: Any = map) -> PagedKV:
        where = self.num_pages, self.page_size, self.dtype, self.mesh, self.rules
        with self.here():
            made = PagedKV.create(self.config, *where, each=each)
        return made if self.device is None else jax.device_put(made, self.device)

    def here(self) -> contextlib.AbstractContextManager[Any]:
        """Around what reads the cache outside of a model's programs: it runs where the cache is."""
        if self.device is None:
            return contextlib.nullcontext()
        return jax.default_device(self.device)

    @property
    def target(self) -> Target:
        """What reads the cache."""
        return target_of(self.device if self.mesh is None else self.mesh)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that fit into an empty pool."""
        return self._allocator.capacity * self.page_size

    @property
    def free_tokens(self) -> int:
        """Tokens that fit without evicting anything."""
        with self.lock:
            self._take_back()
            return self._allocator.num_free * self.page_size

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread, and no Ctrl-C, until the block ends."""
        with self.lock, uninterrupted():
            yield

    @contextlib.contextmanager
    def within_memory(self, what: str) -> Iterator[None]:
        """Says which setting to change where the device has no memory left for something.

        Raises:
          CacheFullError: it has not.
        """
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise CacheFullError(
                f"there is no memory left for {what}; lower {self._setting}, which is taken whole "
                f"when a database is first used ({str(error).splitlines()[0][:200]})"
            ) from error

    def own(self, pages: np.ndarray) -> np.ndarray:
        """Of some pages those of this pool; the others are in mapped files."""
        return pages[pages < self.num_pages]

    def in_files(self, sequence: PagedSequence) -> int:
        """Tokens of a sequence that lie in mapped files."""
        return min(self.mapped_pages(sequence) * self.page_size, sequence.length)

    def mapped_pages(self, sequence: PagedSequence) -> int:
        """How many of a sequence's pages are in mapped files: its first ones."""
        return len(sequence.pages) - len(self.own(sequence.pages))

    def generations(self, pages: np.ndarray) -> np.ndarray:
        """A number of each page that grows whenever its contents may change: what was learnt of a
        page holds as long as its generation is the same. At least 1.
        """
        return self._generations[pages]

    def _take_back(self) -> None:
        while self._returned:
            self._allocator.release(self._returned.popleft())

    @contextlib.contextmanager
    def lend(self) -> Iterator[Lent]:
        """Lends the cache to programs that donate it; who has it puts back what each gives back.

        Where one of several programs fails, the cache is what those before it left: what they wrote
        is behind the tokens that a sequence has, and counts as nothing. It is lost where a program
        that had donated layers did not give them back.
        """
        with self.alone(), self.within_memory("a program beside the KV cache"):
            lent = Lent(self.kv)
            try:
                yield lent
            finally:
                self._kv = lent.kv
        if lent.result is not None:
            _under_way.append(lent.result)

    def holders(self, pages: np.ndarray) -> np.ndarray:
        """How many sequences hold each of some pages, int32 [n]."""
        with self.lock:
            self._take_back()
            return self._allocator.holders(pages)

    def reserve(self, sequence: PagedSequence, count: int, *, collect: bool = True) -> None:
        """Makes room for `count` tokens behind a sequence: pages of its own, copied where shared.

        Args:
          sequence: whose.
          count: of tokens.
          collect: asks the garbage collector for pages too, which takes its time.

        Only what is reserved is written to. So these pages' generations end here, also that of the
        one that the last token is in: others may have filled it before they left it.

        Raises:
          CacheFullError: the pool is exhausted, whatever is evicted; nothing changes.
        """
        if not count:
            return
        size = self.page_size
        tail = sequence.length // size
        with self.alone():
            self._take_back()
            needed = max(0, -(-(sequence.length + count) // size) - len(sequence.pages))
            # Only the page that the last token is in can be shared: later ones hold no token.
            last = sequence.pages[tail : tail + 1] if sequence.length % size else sequence.pages[:0]
            copied = last.copy()
            if len(self.own(last)) and not self._allocator.is_shared(int(last[0])):
                copied = last[:0]
            own = self.own(sequence.pages)
            after = int(own[-1]) if len(own) else None
            fresh = self._allocate(needed + len(copied), after, collect)
            if len(copied):
                try:
                    self._copy_page(sequence, copied, fresh[:1])
                except BaseException:
                    self._allocator.release(fresh)
                    raise
                sequence.pages[tail], fresh = fresh[0], fresh[1:]
                self._allocator.release(self.own(copied))
            sequence.pages = np.concatenate([sequence.pages, fresh]).astype(np.int32)
            self._generations[sequence.pages[tail:]] += 1

    def _copy_page(self, sequence: PagedSequence, source: np.ndarray, target: np.ndarray) -> None:
        if len(self.own(source)):
            with self.here(), self.lend() as lent:
                lent.kv = _copy_pages(lent.kv, source, target, place=self._place)
            return
        assert sequence.host is not None
        k, v = sequence.host.read(source - self.num_pages)
        with self.here(), self.lend() as lent:
            lent.kv = _fill_pages(lent.kv, target, k, v)

    def _allocate(self, n: int, after: int | None, collect: bool) -> np.ndarray:
        while self._allocator.num_free < n and self._evict():
            self._take_back()
        if self._allocator.num_free < n and collect:
            gc.collect()  # sessions that nobody can reach any more, in a circle of references
            self._take_back()
        return self._allocator.allocate(n, after)

    @uninterrupted()
    def trim(self, sequence: PagedSequence, keep: int = 0) -> None:
        """Gives back pages past the sequence's length, but for the first `keep`; waits for
        nobody.
        """
        keep = max(keep, -(-sequence.length // self.page_size))
        pages, sequence.pages = sequence.pages[keep:], sequence.pages[:keep]
        self._returned.append(self.own(pages))

    def share(self, sequence: PagedSequence, length: int) -> PagedSequence:
        """A second holder of the first `length` tokens."""
        pages = sequence.pages[: -(-length // self.page_size)]
        with self.lock:
            self._allocator.share(self.own(pages))
        return PagedSequence(pages.copy(), length, sequence.host and sequence.host.again())

    def mapped(self, host: HostPool, length: int) -> PagedSequence:
        """The first `length` tokens in mapped files: they take nothing of the pool."""
        return PagedSequence(self._of_files(host, -(-length // self.page_size)), length, host)

    def _of_files(self, host: HostPool, count: int) -> np.ndarray:
        """Ids of the first mapped pages of a context."""
        return (host.pages[:count] + self.num_pages).astype(np.int32)

    def bring(self, sequence: PagedSequence) -> None:
        """Copies a sequence's mapped pages into the pool, in their place.

        Raises:
          CacheFullError: there is no room; ContextError: a page is damaged. Nothing changes.
        """
        host, count = sequence.host, self.mapped_pages(sequence)
        if host is None:
            return
        with self.lock:
            with self.alone():
                self._take_back()
                fresh = self._allocate(count, None, True)
                self._generations[fresh] += 1
            try:
                new = PagedSequence(np.asarray(fresh, np.int32))
                for layer in range(len(host.layers)):
                    k, v = host.read_layer(layer, sequence.pages[:count] - self.num_pages)
                    heads, *_, dim = k.shape
                    self.write(new, layer, k.reshape(heads, -1, dim), v.reshape(heads, -1, dim))
            except BaseException:
                self._allocator.release(fresh)
                raise
            sequence.pages = np.concatenate([new.pages, sequence.pages[count:]])
            sequence.host = None

    @uninterrupted()
    def map_first(self, sequence: PagedSequence, host: HostPool, count: int) -> None:
        """Takes a sequence's first pages from mapped files, which hold the same, and gives its own
        back.
        """
        first, rest = sequence.pages[:count], sequence.pages[count:]
        sequence.pages = np.concatenate([self._of_files(host, count), rest])
        sequence.host = host
        self._returned.append(self.own(first))

    @uninterrupted()
    def release(self, sequence: PagedSequence) -> None:
        """Gives back all pages of a sequence, which is empty then; waits for nobody."""
        pages, sequence.pages, sequence.length = sequence.pages, sequence.pages[:0], 0
        sequence.host = None
        self._returned.append(self.own(pages))

    def table(self, sequences: list[PagedSequence]) -> PageTable:
        """The page table of a batch, as wide as the next bucket."""
        if self.shards > 1:
            return self._spread_table(sequences)
        longest = max(len(s.pages) for s in sequences)
        there = self.num_pages + max((s.host.num_pages for s in sequences if s.host), default=0)
        width = min(table_width(longest), there - 1)
        pages = np.zeros((len(sequences), width), np.int32)
        for row, sequence in zip(pages, sequences, strict=True):
            n = len(sequence.pages)
            row[:n] = sequence.pages
            # The rest of the last tile is never seen; as a run it keeps that tile one slice.
            last = sequence.pages[-1] if n else -1
            row[n:] = np.minimum(np.arange(last + 1, last + 1 + width - n), there - 1)
        # Not `jnp.asarray`, which compiles a copy for each shape.
        length = np.asarray([s.length for s in sequences], np.int32)
        with self.here():
            return PageTable(jax.device_put(pages), jax.device_put(length))

    def _spread_table(self, sequences: list[PagedSequence]) -> PageTable:
        """The table of pages that are spread over devices: for each, a list of its own."""
        per_shard = self.num_pages // self.shards
        placed = [np.divmod(s.pages, per_shard) for s in sequences]
        longest = max(int(np.bincount(shard, minlength=1).max()) for shard, _ in placed)
        width = min(table_width(longest, self.shards), per_shard - 1)
        shape = (len(sequences), self.shards, width)
        pages, start = np.zeros(shape, np.int32), np.full(shape, UNUSED, np.int32)
        for b, (shard, local) in enumerate(placed):
            for s in range(self.shards):
                mine = np.flatnonzero(shard == s)
                pages[b, s, : len(mine)] = local[mine]
                start[b, s, : len(mine)] = mine * self.page_size
                last = int(local[mine[-1]]) if len(mine) else -1
                rest = np.arange(last + 1, last + 1 + width - len(mine))
                pages[b, s, len(mine) :] = np.minimum(rest, per_shard - 1)
        flat = (len(sequences), self.shards * width)
        assert self._place is not None
        place = NamedSharding(self._place.mesh, PartitionSpec(None, self._place.spec[1]))

        def put(x: np.ndarray) -> jax.Array:
            x = x.reshape(flat)
            return jax.make_array_from_callback(flat, place, x.__getitem__)

        length = jax.device_put(np.asarray([s.length for s in sequences], np.int32))
        return PageTable(put(pages), length, put(start))

    def write(
        self, sequence: PagedSequence, layer: int, k: np.ndarray, v: np.ndarray, start: int = 0
    ) -> None:
        """Writes tokens [K, n, D] of one layer into the pages reserved for them.

        Args:
          sequence: whose pages.
          layer: which.
          k, v: of the tokens from `start` on.
          start: first of a page.
        """
        first = start // self.page_size
        heads, n, dim = k.shape
        count = -(-n // self.page_size)
        width = bucket(count, TRANSFER_WIDTH, 2)
        pages = np.full(width, cache.NO_PAGE, np.int32)
        pages[:count] = sequence.pages[first : first + count]

        def paged(x: np.ndarray) -> np.ndarray:
            out = np.zeros((heads, width * self.page_size, dim), x.dtype)
            out[:, :n] = x
            return out.reshape(heads, width, self.page_size, dim)

        with self.here(), self.alone():
            old = self.kv
            new_k, new_v = _write_pages(
                old.k[layer], old.v[layer], pages, paged(k), paged(v), place=self._place
            )
            self._kv = old.replace_layer(layer, new_k, new_v)

    def read(
        self, sequence: PagedSequence, layer: int, start: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of one layer from `start` on, each [K, n - start, D], on the host."""
        first = start // self.page_size
        held = self.gather(sequence, layer, sequence.length, first)
        tokens = slice(start - first * self.page_size, sequence.length - first * self.page_size)
        k, v = (np.asarray(x)[:, tokens] for x in held)
        return k, v

    def gather(
        self, sequence: PagedSequence, layer: int, count: int, first: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """The tokens of one layer from its page `first` up to `count`, and some more, each
        [K, n, D], on every device.
        """
        count = -(-count // self.page_size) - first
        pages = np.zeros(bucket(count, TRANSFER_WIDTH, 2), np.int32)
        pages[:count] = sequence.pages[first : first + count]
        place, host = whole(self.mesh), None
        if sequence.host is not None:
            sequence.host.verify(layer)
            host = sequence.host.layers[layer]
        with self.here(), self.lock:
            kv = self.kv
            k, v = joined(kv.k[layer], host and host.k), joined(kv.v[layer], host and host.v)
            return _read_tokens(k, v, pages, place=place)


@functools.partial(jax.jit, donate_argnames=("kv",), static_argnames=("place",))
def _copy_pages(
    kv: PagedKV,
    source: jax.Array,
    target: jax.Array,
    *,
    place: NamedSharding | None,
) -> PagedKV:
    return laid(cache.copy_pages(kv, source, target), place)


@functools.partial(jax.jit, donate_argnames=("kv",))
def _fill_pages(kv: PagedKV, pages: jax.Array, k: jax.Array, v: jax.Array) -> PagedKV:
    """Writes pages [L, K, n, Z, D] of all layers; not over a mesh."""

    def fill(pools: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(cache.write_pages(pool, pages, x) for pool, x in zip(pools, new, strict=True))

    return PagedKV(fill(kv.k, k), fill(kv.v, v))


@functools.partial(jax.jit, donate_argnames=("k_pool", "v_pool"), static_argnames=("place",))
def _write_pages(
    k_pool: jax.Array,
    v_pool: jax.Array,
    pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    place: NamedSharding | None,
) -> tuple[jax.Array, jax.Array]:
    new = cache.write_pages(k_pool, pages, k), cache.write_pages(v_pool, pages, v)
    return laid(new, place)


@functools.partial(jax.jit, static_argnames=("place",))
def _read_tokens(
    k_pool: Pool, v_pool: Pool, pages: jax.Array, *, place: NamedSharding | None
) -> tuple[jax.Array, jax.Array]:
    return laid((cache.read_tokens(k_pool, pages), cache.read_tokens(v_pool, pages)), place)
