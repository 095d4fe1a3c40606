"""What a plan attends to, held against full attention: one query token, one layer, every key seen.

It costs more than the attention that it judges, and runs only when asked for.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alaya_jax.attention.graph import find
from alaya_jax.attention.paged import attend_range
from alaya_jax.attention.retrieve import retrieve
from alaya_jax.attention.rows import Held, Rows
from alaya_jax.attention.window import Split
from alaya_jax.cache.tiers import Pool
from alaya_jax.cache.views import KeyRange, Pages, score_range
from alaya_jax.index import Graphs, LayerIndex, recover
from alaya_jax.query import Full, Window
from alaya_jax.query.plan import Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Truth:
    """Of one query token and layer. A column is a token of the page table (see `Pages`).

    Attributes:
      attended: bool [H, S], keys that the plan attends to.
      retrieved: bool [H, S], those of them outside the window.
      recovery: float32 [H], their share of the attention mass.
      beta: float32 [H], how far the least of the retrieved scores lies below the best of all keys;
        0 where none was retrieved.
      beta_needed: float32 [H], the smallest beta that keeps the share asked for.
      keys_needed: int32 [H], keys outside the window in that range.
      out: float32 [H, D], full attention.
      position: int32 [S], of each column.
    """

    attended: Bool[Array, "H S"]
    retrieved: Bool[Array, "H S"]
    recovery: Float[Array, " H"]
    beta: Float[Array, " H"]
    beta_needed: Float[Array, " H"]
    keys_needed: Int[Array, " H"]
    out: Float[Array, "H D"]
    position: Int[Array, " S"]


@jax.jit
def truth(
    plan: Plan,
    q: Float[Array, "H D"],
    pages: tuple[Pool, Pool, Array, Array | None],
    length: Int[Array, ""],
    index: LayerIndex | Graphs | None,
    covered: Int[Array, ""],
    wanted: Float[Array, ""],
) -> Truth:
    """Judges a plan by the last token's query.

    Args:
      plan: what is judged.
      q: rotated, unscaled.
      pages: of one sequence, all on one device of the context axis: the pool's k and v of the
        layer [K, P, Z, D], page ids [N], and the position of each page's first token or None.
      length: tokens that the query sees, its own among them.
      index: what the plan's index holds of this layer; None: it scores all keys.
      covered: keys that the index knows, from the first on.
      wanted: share of the attention mass that `beta_needed` and `keys_needed` are for; they count
        with the plan's window, or the default one where it has none.
    """
    held = Pages(*pages)
    dim, kv_heads = q.shape[-1], held.k.shape[0]
    rows = q.reshape(kv_heads, -1, 1, dim)
    zero, end = jnp.zeros(1, jnp.int32), length[None]
    full, _ = attend_range(rows, held, KeyRange(zero, end))
    scores = score_range(rows.astype(held.operand_dtype), held, KeyRange(zero, end))

    query = plan.query
    window = query if isinstance(query, Window) else getattr(query, "window", Window())
    graph = index[0] if isinstance(index, tuple) else None
    split = Split.of(window, end, None if graph is None else graph.length)
    inside, best_inside = attend_range(rows, held, split.inside)
    position = held.all_positions()
    of_window = split.inside.mask(position)

    if isinstance(query, Full):
        attended = scores > -jnp.inf
        retrieved = attended & ~of_window
    else:
        retrieved = jnp.zeros(scores.shape, bool)
        if plan.retrieves:
            asked = Rows(rows, Held(held), split.outside, inside, best_inside)
            if not isinstance(index, tuple):  # else what answers where a graph's search overflows
                asked = dataclasses.replace(asked, held=Held(held, index, covered))
            found = retrieve(plan, asked)
            mask = found.kept.mask
            if found.kept.by_page:
                mask = jnp.repeat(mask, held.size, axis=-1) & found.kept.keys.mask(position)
            if found.floor is not None:
                mask &= scores >= found.floor[..., None]
            if graph is not None:
                met = find(plan, dataclasses.replace(asked, held=Held(held, graph)))
                column = jnp.where(met.scores > -jnp.inf, met.positions, held.columns)
                lists = column.reshape(-1, column.shape[-1])
                row = jnp.arange(len(lists))[:, None]
                there = jnp.zeros((len(lists), held.columns), bool)
                there = there.at[row, lists].set(True, mode="drop").reshape(mask.shape)
                mask = jnp.where(met.overflow[..., None], mask, there)
            retrieved = mask & (scores > -jnp.inf)
        attended = retrieved | (of_window & (scores > -jnp.inf))

    weight = jax.nn.softmax(dim**-0.5 * scores, axis=-1)
    best = jnp.max(scores, axis=-1)
    least = jnp.min(jnp.where(retrieved, scores, jnp.inf), axis=-1)
    needed = recover(
        jnp.where(of_window, -jnp.inf, scores), inside.lse, best_inside, wanted, dim, margin=0.0
    )

    def by_head(x: Array) -> Array:
        return x.reshape(q.shape[0], *x.shape[3:])

    return Truth(
        attended=by_head(attended),
        retrieved=by_head(retrieved),
        recovery=by_head(jnp.sum(jnp.where(attended, weight, 0.0), axis=-1)),
        beta=by_head(jnp.where(least < jnp.inf, best - least, 0.0)),
        beta_needed=by_head(needed.beta),
        keys_needed=by_head(jnp.sum(needed.kept, axis=-1, dtype=jnp.int32)),
        out=by_head(full.out),
        position=position,
    )
