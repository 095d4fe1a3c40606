"""What a plan costs: seconds and bytes of one layer, from a machine's constants.

The model has one term for each part of a decode step (attention/engine.py):

  Full        call + full * n
  Window      call + full * w
  retrieval   call + find + full * w + scan * (n - w) + select * S + gather * r
  by page     the same with constants of its own
  graph       call + full * w + walk + visit * visited(r) + a mark for each key of the graph

n keys, w of them in the window, S columns of the page table (a table comes in few widths, and
choosing among scores takes all of it), r keys read for the kv head that reads most, of whole pages
where those are retrieved. Through a graph the window holds what the graph does not know, and r are
the keys within the range that is asked for (`visited` says how many keys a walk scores to find
them). The constants are those of one layer of the model's own shape (`machine.py`). Where a mesh
splits keys or heads, n and the shape are a device's share; what the devices tell each other is left
out.
"""

import dataclasses

import numpy as np

from alaya_jax.cache.tables import table_width
from alaya_jax.errors import RequestError
from alaya_jax.index import Flat, Graph, Sketch
from alaya_jax.index.graph.build import START_EVERY, STARTS
from alaya_jax.index.graph.search import MARK
from alaya_jax.models.config import LlamaConfig
from alaya_jax.query import Full, TopK, Window
from alaya_jax.query.plan import Plan

_MET = (92.0, 0.65)
"""A walk that lists m keys scores about `92 * m ** 0.65` in a graph of `_DEGREE`: the neighbours of
listed keys are more and more often met before (benchmarks/plan_accuracy.py, part graph)."""

_DEGREE = 32  # of the graphs of that curve; their starts, as many as there are at least, are in it

_MARK_BYTES = np.dtype(MARK).itemsize


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is to be served.

    Attributes:
      config: of the model.
      dtype: of keys and values.
      length: tokens of each sequence.
      batch: B.
      page_size: Z.
      pool_tokens: tokens that the pool of pages holds, which the indexes cover too; None: those
        of the batch.
      weight_bytes: of the model, that a token reads.
      idle_bytes: of the rest of the model: an embedding of its own, of which a token reads a row.
      tensor, context: devices that heads and keys are split over.
      graph: how the graph of the sequences' stored contexts is built; None: they have none.
      graph_length: keys that it covers, from the first on.
      graph_bytes: that a layer of the graphs takes of memory; None: as an estimate says.
      sketches: that may be asked, the one to prefer first.
    """

    config: LlamaConfig
    dtype: np.dtype
    length: int
    batch: int = 1
    page_size: int = 16
    pool_tokens: int | None = None
    weight_bytes: int = 0
    idle_bytes: int = 0
    tensor: int = 1
    context: int = 1
    graph: Graph | None = None
    graph_length: int = 0
    graph_bytes: int | None = None
    sketches: tuple[Sketch, ...] = (Sketch(),)

    @property
    def held(self) -> int:
        """Tokens that memory is taken for: whole pages."""
        if self.pool_tokens is not None:
            return self.pool_tokens
        return self.batch * -(-self.length // self.page_size) * self.page_size

    @property
    def key_bytes(self) -> int:
        """Of a key, or a value, of all kv heads of a layer."""
        return self.config.layer_kv_width // 2 * np.dtype(self.dtype).itemsize

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values of all layers."""
        return self.config.kv_width * np.dtype(self.dtype).itemsize * self.held


@dataclasses.dataclass(frozen=True)
class Machine:
    """Constants of a device for one shape of attention layer.

    Attributes:
      device: which.
      copy: bytes/s read and written by a copy.
      matmul: FLOP/s of a large product in the model's dtype.
      weights: bytes/s at which a matrix is read for a product with one row.
      call: seconds of a layer's attention beside all that grows with keys.
      full: seconds a key of full attention, all heads.
      flat, sketch: seconds a key to score it, from the key itself and from 4 bits a channel.
      select: seconds a column of the page table to choose among scores.
      gather: seconds a key kept, of all kv heads at once, to read and attend to it.
      find: seconds of a retrieval beside all that grows with keys.
      page_scan, page_select, page_gather, page_find: what `sketch`, `select`, `gather` and `find`
        are where pages are retrieved, for all heads of a group; None: not measured.
      walk: seconds of a search of a graph beside what it scores; None: not measured.
      visit: seconds a key scored by that search, of each kv head, values of what it finds included.
      busy: share of the machine's CPUs that other programs took when this was measured.
    """

    device: str
    copy: float
    matmul: float
    weights: float
    call: float
    full: float
    flat: float
    sketch: float
    select: float
    gather: float
    find: float = 0.0
    page_scan: float | None = None
    page_select: float | None = None
    page_gather: float | None = None
    page_find: float | None = None
    walk: float | None = None
    visit: float | None = None
    busy: float = 0.0

    def to_dict(self) -> dict[str, float | str | None]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class KeysKept:
    """Keys outside the window that a query keeps, mean over query tokens.

    Attributes:
      attended: of a query head.
      read: of the kv head that reads most: what any of its query heads keeps.
    """

    attended: float
    read: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one layer.

    Attributes:
      seconds: a decode step's attention.
      read: bytes of keys, values and index that it reads.
      memory: bytes that the index takes.
    """

    seconds: float
    read: float
    memory: int


def visited(graph: Graph, length: int, listed: float) -> float:
    """Keys that a walk scores, of a kv head, to list so many; see `_MET`."""
    scale, power = _MET
    met = scale * graph.degree / _DEGREE * max(listed + graph.l0, 1.0) ** power
    starts = max(length / START_EVERY - STARTS, 0.0)
    return float(starts + max(length, 1) * -np.expm1(-met / max(length, 1)))


def cost(plan: Plan, work: Workload, machine: Machine, kept: KeysKept | None = None) -> Cost:
    """Predicts one layer.

    Args:
      plan: `Full`, `Window`, a retrieval by key through `Flat`, `Sketch` or `Graph`, or by page for
        a group through `Sketch`.
      work: what is served.
      machine: where.
      kept: keys outside the window that are kept; may be left out for `TopK(k)`, whose k is known.

    Raises:
      RequestError: there is no model of such a plan.
    """
    n = -(-work.length // work.context)
    key = work.key_bytes
    if isinstance(plan.query, Full):
        seconds = machine.call + machine.full * n
        return Cost(work.batch * seconds, 2.0 * key * work.batch * work.length, 0)
    window = plan.query if isinstance(plan.query, Window) else plan.query.window
    size = min(int(window.sink) + int(window.recent), work.length)
    seconds = machine.call + machine.full * min(size, n)
    if isinstance(plan.query, Window):
        return Cost(work.batch * seconds, 2.0 * key * work.batch * size, 0)
    index, by_page = plan.index, plan.by == "page"
    paged = plan.share == "group" and isinstance(index, Sketch)
    if not isinstance(index, Flat | Sketch | Graph) or (by_page and not paged):
        raise RequestError(
            f"there is no cost model of {plan}; it covers Flat, Sketch and Graph by key, "
            "and Sketch by page for a group"
        )
    if kept is None:
        if not isinstance(plan.query, TopK):
            raise RequestError(f"cost({plan}): say how many keys it keeps, with kept=KeysKept(...)")
        kept = KeysKept(plan.query.k, plan.query.k * work.config.group_size)
    if isinstance(index, Graph):
        return _walk(index, window, work, machine, kept)
    outside = max(work.length - size, 0)
    read = min(kept.read, outside)
    scan, select, gather, find = _constants(index, by_page, machine)
    if isinstance(index, Flat):
        memory, scanned = 0, float(key)
    else:
        page = index.page_bytes(work.config, work.page_size, work.dtype)
        memory, scanned = page * -(-work.held // work.page_size), page / work.page_size
    held = -(-work.held // work.page_size // work.context)
    width = min(table_width(-(-n // work.page_size), work.context), held)
    columns = work.page_size * width
    seconds += find + scan * max(n - size, 0) + select * columns + gather * read / work.context
    total = scanned * outside + 2.0 * key * (read + size)
    return Cost(work.batch * seconds, work.batch * total, memory)


def _constants(
    index: Flat | Sketch, by_page: bool, machine: Machine
) -> tuple[float, float, float, float]:
    """Of a retrieval: scan, select, gather and find."""
    bits = 0.0
    if isinstance(index, Sketch):
        # A CPU counts signs of 1 bit in 0.7 of the time of 4 random bits; of others that was not
        # measured. All are taken for as dear, and so the lighter is chosen for its memory alone.
        bits = 1.0 if index.basis == "learnt" else index.bits / 4
    if not by_page:
        scan = machine.sketch * bits if bits else machine.flat
        return scan, machine.select, machine.gather, machine.find
    asked = machine.page_scan, machine.page_select, machine.page_gather, machine.page_find
    known = [x for x in asked if x is not None]
    if len(known) < len(asked):
        raise RequestError("retrieving pages was not measured on this machine: measure(pages=True)")
    scan, select, gather, find = known
    return scan * bits, select, gather, find


def _walk(index: Graph, window: Window, work: Workload, machine: Machine, kept: KeysKept) -> Cost:
    """Of a search through a graph; keys that it does not know are in the window."""
    if machine.walk is None or machine.visit is None:
        raise RequestError("a search of a graph was not measured on this machine: machine.graph()")
    n, known = work.length, min(work.graph_length, work.length)
    inside = min(int(window.sink) + max(int(window.recent), n - known), n)
    outside = max(n - inside, 0)
    met = visited(index, outside, min(kept.read, outside))
    heads = work.config.num_key_value_heads
    marks = _MARK_BYTES * heads / work.tensor * known / machine.copy
    seconds = machine.call + machine.full * inside + machine.walk + machine.visit * met + marks
    if kept.read > index.capacity:  # such searches are answered by the scan of all keys
        seconds += machine.find + machine.flat * outside
        seconds += machine.gather * min(kept.read, outside)
    item = work.key_bytes / heads
    row = 4 * index.degree
    read = (
        heads * (met * item + min(kept.read, outside) * (row + item)) + 2.0 * inside * heads * item
    )
    memory = work.batch * heads * row * known if work.graph_bytes is None else work.graph_bytes
    return Cost(work.batch * seconds, work.batch * read, memory)


def step_seconds(work: Workload, machine: Machine) -> float:
    """A decode step without its attention: the weights are read once for the batch."""
    return work.weight_bytes / work.tensor / machine.weights
