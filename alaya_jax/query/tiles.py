"""What a prefill may ask of the keys: blocks of them, for blocks of queries."""

import dataclasses
import math

import jax

from alaya_jax.errors import RequestError
from alaya_jax.query import Window

NEAR = Window(sink=16, recent=256)
"""The window of a block of queries. On real keys, that much of the recent ones improves the worst
queries more than as many blocks chosen elsewhere would; a longer sink does not
(benchmarks/sparse_prefill.py)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block-sparse attention of many queries: two rules, alone or together.

    `beta` skips what is not worth its softmax. Keys are scored tile by tile; a tile in which every
    query's best score is below that query's best so far minus beta is left there: no softmax, no V
    (BSFA, arXiv 2512.07011, with DIPR's range in place of a calibrated threshold). Exact: of the
    keys that are scored, none within beta of its query's best is ever lost. Infinite: none is
    skipped.

    `recovery` chooses the blocks that are scored at all, from the attention of a few queries of the
    block (`samples`, spread evenly): in order of the share of mass that these give them, as many as
    it takes for each of these to hold `recovery` of its mass. An estimate: on keys of
    SmolLM2-135M 93% to 97% of all queries hold it then (benchmarks/sparse_prefill.py). 1 leaves
    nothing out, and only sets the order; with None there is no estimate, and keys come in order of
    position.

    The window's keys are always attended, but by blocks: those of the sink and those within
    `recent` of a query of the block.

    Attributes:
      beta: range in raw products, at least 0; a number, or an array [H].
      recovery: in (0, 1], or None.
      window: the first and last keys; `recent` counts back from the first query of a block.
      q_block: queries that share one list of key blocks. Static.
      kv_block: keys chosen together, a multiple of the page size; None: a page. Static.
      samples: queries of a block that are asked. Static.
    """

    beta: float | jax.Array = math.inf
    recovery: float | jax.Array | None = None
    window: Window = NEAR
    q_block: int = dataclasses.field(default=128, metadata={"static": True})
    kv_block: int | None = dataclasses.field(default=None, metadata={"static": True})
    samples: int = dataclasses.field(default=8, metadata={"static": True})

    def __post_init__(self):
        # Tracers and other placeholders pass: jax rebuilds queries from their leaves.
        if isinstance(self.beta, int | float) and not self.beta >= 0:
            raise RequestError(f"Tiles(beta={self.beta}): must be at least 0")
        if isinstance(self.recovery, int | float) and not 0 < self.recovery <= 1:
            raise RequestError(
                f"Tiles(recovery={self.recovery}): a share of the attention mass, above 0 and at "
                "most 1; None scores every key"
            )
        for name in ("q_block", "kv_block", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"Tiles({name}={value}): must be at least 1")
