"""A model's layers as a chain of compiled programs, called one after another from the host."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.api_util import shaped_abstractify
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.attention.counts import Counts
from alaya_jax.attention.met import tells
from alaya_jax.cache import PagedKV, PageTable
from alaya_jax.cache.pool import Lent
from alaya_jax.compilation import Ahead, Coming, compiling
from alaya_jax.frame import Frame
from alaya_jax.index import Indexed
from alaya_jax.models import llama
from alaya_jax.models.llama import Params
from alaya_jax.models.matrices import Matrix
from alaya_jax.query.plan import Plan, Plans, of_layer
from alaya_jax.runtime import programs
from alaya_jax.runtime.layer_groups import Group, groups
from alaya_jax.runtime.programs import Asked, Fed, Going, Passed, Row
from alaya_jax.runtime.reading import Reading
from alaya_jax.runtime.sampling.sampler import Processors
from alaya_jax.sharding import laid, spread, whole

AHEAD_AFTER = 1.0
"""Seconds of a prefill after which the programs of decoding are made ready beside it."""


class Stack:
    """The layers of one model, in programs of a few layers each.

    Layers that are alike (shapes of parameters, plan, index) share a compiled program.
    """

    def __init__(self, params: Params, frame: Frame, layers_per_program: int | None = None):
        """Args: parameters; what is static; most layers of a program, None: about five."""
        self.frame = frame
        self.outer = llama.outer_params(params)
        self._params = params
        self._per_program = layers_per_program
        self._known: set[Any] = set()
        """What programs were called for so far: for another, one is compiled."""
        self._coming: dict[Any, Coming] = {}
        """Programs that are made ready before their first call, by what they are called for."""
        self._device = _device_of(params)

    @functools.cached_property
    def _blocks(self) -> list[Params]:
        """Parameters of each layer; a session that only `update`s and asks needs none."""
        layers = range(self.frame.config.num_hidden_layers)
        return [llama.layer_params(self._params, i) for i in layers]

    @functools.cached_property
    def _kinds(self) -> list[Any]:
        """What makes each layer's program, beside how it attends."""
        return [_kind(block) for block in self._blocks]

    @functools.cached_property
    def dtype(self) -> Any:
        """Of what passes from layer to layer: the widest that any parameter leads to."""
        leaves = jax.tree.leaves(self._blocks, is_leaf=_is_matrix)
        arrays = [x.dtype for x in leaves if not _is_matrix(x)]
        return jnp.result_type(self.outer["embed"]["embedding"].dtype, *arrays)

    def put(self, tree: Any) -> Any:
        """A tree with arrays of the host where programs expect them: on every device of a mesh.

        Nothing is compiled for it (`jnp.asarray` compiles a copy for each shape); and what comes
        from the host lies as what a program returns. Nobody may write to the arrays any more.
        """
        place = whole(self.frame.mesh) or self._device

        def put(x: Any) -> Any:
            if not isinstance(x, np.ndarray | np.generic):
                return x
            if isinstance(place, jax.sharding.NamedSharding):
                return jax.make_array_from_callback(np.shape(x), place, np.asarray(x).__getitem__)
            return jax.device_put(x, place)

        return spread(jax.tree.map(put, tree), self.frame.mesh)

    def at_cache(self, tree: Any) -> Any:
        """A tree of what attention reads, on the device that it reads it on."""
        return self.put(tree)

    def start(
        self, batch: int, passed: Passed | None = None, account: tuple[int, ...] | None = None
    ) -> Passed:
        """What layer 0 is passed; of an earlier step, what it made of sequences that are not fed
        now.

        Args:
          batch: B.
          passed: of that step.
          account: see `Chain.account`.
        """
        if passed is not None:
            last = passed.last
        else:
            last = self.put(np.zeros((batch, self.frame.config.hidden_size), self.dtype))
        return Passed(last, self.put(np.int32(0)), self._nothing_read(batch, account))

    def _nothing_read(self, batch: int, account: tuple[int, ...] | None) -> Counts:
        """Counts where a step's programs expect them."""
        counts, place = self._zeros(batch, account), programs.by_heads(self.frame)
        if place is None:
            return self.put(counts)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, place, x.__getitem__), counts
        )

    def _zeros(self, batch: int, account: tuple[int, ...] | None) -> Counts:
        c = self.frame.config
        shape = c.num_hidden_layers, batch, c.num_attention_heads
        zero: Any = np.zeros(shape, np.int32)
        mass: Any = np.zeros(shape, np.float32)
        met: Any = None if account is None else np.zeros((shape[0], *account), np.uint8)
        return Counts(zero, zero, zero, mass, zero, mass, met)

    def counts(self, passed: Passed) -> Counts:
        """What the layers read, where every process can read it."""
        place = whole(self.frame.mesh)
        return passed.counts if place is None else _copied(passed.counts, place)

    def between(self, batch: int, tokens: int) -> Array:
        """Room for what passes from layer to layer, [B, T, E]."""
        shape = batch, tokens, self.frame.config.hidden_size
        return self.put(np.zeros(shape, self.dtype))

    def chain(
        self, plans: Plans, indexed: Indexed | None, reading: Reading | None = None
    ) -> "Chain":
        """The groups of layers that share a program each, and how their layers attend.

        Args:
          plans: how attention is answered.
          indexed: what indexes know.
          reading: what is read of mapped pages, by these plans; None: nothing.
        """
        layers = range(len(self._blocks))
        each = [_without_tier(of_layer(plans, i)) for i in layers]
        indexes = [None] * len(each) if indexed is None else indexed.layers
        of = _Kinds()
        kinds = list(zip(self._kinds, map(of, each), map(of, indexes), strict=True))
        links = []
        most = [n for n in (self._per_program, reading and reading.most_layers) if n is not None]
        for group in groups(kinds, min(most, default=None)):
            part = slice(group.first, group.first + group.layers)
            covered = None if indexed is None else indexed.covered
            host = indexed.host[part] if indexed is not None and indexed.host else None
            asked = Asked(tuple(each[part]), tuple(indexes[part]), covered, host)
            key = group.layers, kinds[group.first], _kind(host)
            links.append(_Link(group, tuple(self._blocks[part]), asked, key))
        return Chain(links, reading)

    def layers(
        self, lent: Lent, chain: "Chain", x: Array, passed: Passed, fed: Fed
    ) -> tuple[Array, Passed]:
        """All layers of a step over new tokens, which join the cache.

        Args:
          lent: the cache; it has what each program gave back as soon as that was called.
          chain: how attention is answered.
          x: what the call before returned, or `between`; donated.
          passed: see `start`; donated.
          fed: the new tokens.

        Returns:
          x for the next call; what the layers passed on, all counts included.
        """
        shapes = x.shape, fed.table.pages.shape
        for link in chain.links:
            chain.before(link, passed.layer)
            with self._first("layers", chain, link, shapes):
                x, kv, passed = programs.layers(
                    self.outer,
                    link.blocks,
                    lent.kv.part(*link.group),
                    x,
                    passed,
                    fed,
                    link.asked,
                    frame=self.frame,
                )
            lent.kv = lent.kv.replace_part(link.group.first, kv)
            lent.result = passed.layer
        chain.called.add(("layers", shapes))
        return x, passed

    @contextlib.contextmanager
    def ahead(self, kv: PagedKV, chain: "Chain", table: PageTable, tokens: int) -> Iterator[None]:
        """While the block runs, what `layers` will call behind it is compiled in another thread,
        where that is worth it; not over a mesh.

        Args:
          kv: shapes of the cache.
          chain: how attention will be answered.
          table: of the shapes that it will have then.
          tokens: T.
        """
        ahead = Ahead(AHEAD_AFTER)
        for link, shapes, make in self._missing(kv, chain, table, tokens):
            self._coming[_key("layers", link, shapes)] = ahead.add(make)
        try:
            yield
        finally:
            ahead.end()

    def compile(self, kv: PagedKV, chain: "Chain", table: PageTable, tokens: int) -> None:
        """Compiles what `layers` will call, if it is not; arguments as for `ahead`."""
        for link, shapes, make in self._missing(kv, chain, table, tokens):
            with self._first("layers", chain, link, shapes):
                make()

    def _missing(
        self, kv: PagedKV, chain: "Chain", table: PageTable, tokens: int
    ) -> Iterator[tuple["_Link", Any, Callable[[], object]]]:
        """The programs that `layers` will compile: their first layers, shapes, and how to do it."""
        batch = table.length.shape[0]
        x = jax.ShapeDtypeStruct((batch, tokens, self.frame.config.hidden_size), self.dtype)
        shapes = x.shape, table.pages.shape
        if self.frame.mesh is not None or all(
            _key("layers", link, shapes) in self._known for link in chain.links
        ):
            return
        one = np.zeros((batch, tokens), np.int32), np.zeros(batch, np.int32)
        fed = Fed(*one, table)  # type: ignore[arg-type]
        account = chain.account(table)
        passed = jax.eval_shape(lambda: self.start(batch, None, account))
        for link in chain.links:
            key = _key("layers", link, shapes)
            if key not in self._known and key not in self._coming:
                rest = kv.part(*link.group), x, passed, fed, link.asked
                args = jax.tree.map(self._abstract, (self.outer, link.blocks, *rest))
                lower = functools.partial(programs.layers.lower, *args, frame=self.frame)
                yield link, shapes, lambda lower=lower: lower().compile()

    def _abstract(self, x: Any) -> Any:
        """Of an argument, as it lies when a program is called; a number is its own."""
        if not hasattr(x, "shape"):
            return x
        place = self._device and jax.sharding.SingleDeviceSharding(self._device)
        weak = getattr(x, "weak_type", False)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place, weak_type=weak)

    def logits(self, passed: Passed) -> Float[Array, "B V"]:
        """Logits of each sequence's last token."""
        with self._once(("logits", passed.last.shape), lambda: "the logits"):
            return programs.logits(self.outer, passed.last, frame=self.frame)

    def scores(self, x: Array, targets: np.ndarray, best: int) -> Any:
        """What the model expected behind each token of a chunk; see `programs.scores`."""
        with self._once(("scores", x.shape, best), lambda: "the scores of a prompt"):
            put = self.put(targets)
            return programs.scores(self.outer, x, put, best=best, frame=self.frame)

    def end(
        self,
        passed: Passed,
        going: Going,
        end_ids: Int[Array, "B M"],
        allowed: Bool[Array, " B"],
        processors: Processors,
    ) -> tuple[Row, Passed, Going]:
        """The end of a step: the next token of each sequence; see `programs.end`."""
        key = "end", end_ids.shape, processors, jax.tree.structure(going)
        with self._once(key, lambda: "the choice of a token"):
            return programs.end(
                self.outer,
                passed,
                going,
                end_ids,
                allowed,
                processors=processors,
                frame=self.frame,
            )

    def queries(
        self, kv: PagedKV, chain: "Chain", fed: Fed, take: np.ndarray
    ) -> Iterator[Float[Array, "B n H D"]]:
        """What the layers ask at tokens whose keys and values are in the cache already.

        Args:
          kv: the cache, which stays as it is.
          chain: how attention is answered.
          fed: these tokens; the table has the lengths before them.
          take: which of the T tokens' queries are wanted.

        Yields:
          of each layer, rotated, unscaled queries.
        """
        x, layer = self.between(*fed.tokens.shape), self.put(np.int32(0))
        fed = dataclasses.replace(fed, take=self.put(np.asarray(take, np.int32)))
        shapes = x.shape, fed.table.pages.shape, np.shape(take)
        for link in chain.links:
            chain.before(link, layer)
            with self._first("queries", chain, link, shapes):
                x, layer, q = programs.queries(
                    self.outer,
                    link.blocks,
                    kv.part(*link.group),
                    x,
                    layer,
                    fed,
                    link.asked,
                    frame=self.frame,
                )
            yield from q

    def _first(self, what: str, chain: "Chain", link: "_Link", shapes: Any) -> Any:
        """Around a call of a group's program; the first compiles it."""
        if (what, shapes) in chain.called:
            return _NOTHING
        count = link.group.layers
        plan = link.asked.plans[0]
        name = f"{count} layer{'s' if count > 1 else ''} for {plan}"
        tokens = shapes[0][1]
        text = name if tokens == 1 else f"{name}, {tokens} tokens at a time"
        return self._once(_key(what, link, shapes), lambda: text)

    def _once(self, key: Any, what: Callable[[], str]) -> Any:
        if key in self._known:
            return _NOTHING
        self._known.add(key)
        return compiling(what, self._coming.pop(key, None))


_NOTHING = contextlib.nullcontext()


class _Link(NamedTuple):
    """A group of layers, their parameters, how they attend, and what makes their program."""

    group: Group
    blocks: tuple[Params, ...]
    asked: Asked
    key: Any


def _key(what: str, link: _Link, shapes: Any) -> Any:
    """What a group's program is called for."""
    return what, link.key, shapes


@dataclasses.dataclass(frozen=True)
class Chain:
    """A stack's groups of layers, for some plans.

    Attributes:
      links: the groups in order.
      reading: what they read of mapped pages; None: nothing.
      called: programs that were called, with which shapes.
    """

    links: list[_Link]
    reading: Reading | None = None
    called: set[Any] = dataclasses.field(default_factory=set)

    @property
    def is_lost(self) -> bool:
        """Whether somebody had an index learn a page since, which donates its arrays."""
        return any(x.is_deleted() for x in self._watched)

    @functools.cached_property
    def _watched(self) -> list[Array]:
        """An array of each layer's index: all of a layer are donated together, but for a basis."""
        held = (x for link in self.links for x in link.asked.indexes)
        of_pages = (x.seen_by(None) for x in held if x is not None and not isinstance(x, tuple))
        return [jax.tree.leaves(x)[0] for x in of_pages]

    def before(self, link: _Link, running: Array) -> None:
        """Makes room for what a group reads of mapped pages; see `Reading.before`."""
        if self.reading is not None:
            self.reading.before(*link.group, running)

    def account(self, table: PageTable) -> tuple[int, ...] | None:
        """[B, K, N], the pages of a table of which layers say whether they met them; None: no layer
        says it.
        """
        for link in self.links:
            host = link.asked.host
            if host is not None and any(map(tells, link.asked.plans)):
                batch, width = table.pages.shape
                return batch, host[0].k.shape[0], width
        return None


class _Kinds:
    """What programs see of a tree beside its numbers; looked at once where it is the same tree."""

    def __init__(self):
        self._of: dict[int, Any] = {}

    def __call__(self, tree: Any) -> Any:
        if id(tree) not in self._of:
            self._of[id(tree)] = _kind(tree)
        return self._of[id(tree)]


def _without_tier(plan: Plan) -> Plan:
    """Where pages are is in the arguments: no program is compiled for what a plan says of it."""
    return plan if plan.tier is None else dataclasses.replace(plan, tier=None)


def _kind(tree: Any) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(map(shaped_abstractify, leaves))


@functools.partial(jax.jit, static_argnames="place")
def _copied(tree: Any, place: jax.sharding.NamedSharding) -> Any:
    return laid(tree, place)


def _is_matrix(x: Any) -> bool:
    return isinstance(x, Matrix)


def _device_of(params: Params) -> Any:
    """The device that the parameters are committed to, if it is one; else None."""
    leaf = jax.tree.leaves(params)[0]
    return next(iter(leaf.devices())) if getattr(leaf, "committed", False) else None
