"""Attention with the operations of `pallas_kernels`, for all sequences of a batch at once.

One new token of each sequence
  Full                   paged_decode over the sequence's pages
  Window                 paged_decode over the window's pages
  DIPR(beta) @ Sketch()  sketch_select finds the pages that may hold the best key and paged_decode
                         its score; then paged_decode attends, with the exact threshold, to the
                         pages that may hold a key in range
  other DIPR and TopK    scan and selection are the engine's own (`retrieve`); then paged_decode
                         over the pages that hold a kept key, with a mask of keys

A chunk of new tokens
  Full                   block_sparse_prefill
  Tiles                  block_sparse_prefill with the lists of `select_tiles`

Selection and counts are those of `engine` without kernels, except for `read`: here whole pages are
read.
"""

from jaxtyping import Array, Float

from alaya_jax.attention.counts import Counts
from alaya_jax.attention.kernels import decode, prefill
from alaya_jax.attention.kernels.asking import passed_over
from alaya_jax.attention.layer import LayerQueries
from alaya_jax.errors import KernelError
from alaya_jax.index import Graph
from alaya_jax.pallas_kernels.dispatch import Choice, Target, current_target, not_a_hopper
from alaya_jax.query import Tiles
from alaya_jax.query.plan import Plan


def choose(plan: Plan, batch: LayerQueries, target: Target | None = None) -> Choice:
    """The implementation that runs a plan, and why no faster one does.

    Raises:
      KernelError: the plan names an implementation that cannot run it.
    """
    target = target or current_target()
    named = plan.implementation
    if named == "xla":
        return Choice("attention", "xla", target)
    wanted = named or "mosaic_gpu"
    reason = unfit(plan, batch, wanted, target)
    if reason is None:
        return Choice("attention", wanted, target)
    if named is not None:
        raise KernelError(
            f"Plan({plan}, implementation={named!r}) cannot run on {target}: {reason}; leave "
            "implementation out, or use 'xla'"
        )
    return Choice("attention", "xla", target, (("mosaic_gpu", reason),))


def unfit(plan: Plan, batch: LayerQueries, implementation: str, target: Target) -> str | None:
    """Why the kernels of this implementation cannot run a plan; None if they can.

    Only shapes and dtypes matter, so arrays may be `jax.ShapeDtypeStruct`s.
    """
    t = batch.q.shape[1]
    if implementation == "mosaic_gpu" and (reason := not_a_hopper(target)) is not None:
        return reason  # first, as no other plan or mesh would change it
    if isinstance(plan.index, Graph) and plan.retrieves:
        return "a graph is walked key by key"
    if t == 1 and isinstance(plan.query, Tiles):
        return "Tiles are of a chunk of tokens, and this is one token"
    found = (decode if t == 1 else prefill).choose(plan, batch, target)
    return found if isinstance(found, str) else passed_over(found, implementation)


def attend(
    plan: Plan, batch: LayerQueries, implementation: str, target: Target
) -> tuple[Float[Array, "B T H D"], Counts]:
    """As `engine.attend`, for plans and shapes that are not `unfit`."""
    of_shape = decode if batch.q.shape[1] == 1 else prefill
    options = {"implementation": implementation, "target": target}
    out, counts = of_shape.attend(plan, batch, options)
    return out.astype(batch.q.dtype), counts


__all__ = ["LayerQueries", "attend", "choose", "unfit"]
