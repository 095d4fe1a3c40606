"""Which implementation answers a plan, asked outside any program."""

from typing import Any

import jax
import jax.numpy as jnp

from alaya_jax.attention import kernels
from alaya_jax.cache import PageTable
from alaya_jax.cache.pool import PagePool
from alaya_jax.index.memory import LayerMemory
from alaya_jax.model import Model
from alaya_jax.pallas_kernels.dispatch import Choice
from alaya_jax.query.plan import Plan

_PAGES = 512  # of a pool and a table; which implementation runs does not depend on it


def implementation_of(
    plan: Plan, model: Model | PagePool, page_size: int, tokens: int = 1
) -> Choice:
    """What attends by a plan on the model's devices, and why not what is faster.

    Args:
      plan: of one layer.
      model: its shapes, its mesh.
      page_size: Z.
      tokens: new tokens of each sequence in one call; 1: decoding.

    Raises:
      KernelError: the plan names an implementation that cannot.
    """
    c, mesh, rules = model.config, model.mesh, model.rules
    heads = rules.axis("kv_heads", mesh)
    split = 1 if mesh is None or heads is None else mesh.shape[heads]
    pages = rules.axis("pages", mesh)
    spread = mesh is not None and pages is not None and mesh.shape[pages] > 1

    def array(*shape: int, dtype: jax.typing.DTypeLike = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    shape = (c.num_key_value_heads // split, _PAGES, page_size, c.head_dim)
    pool = array(*shape, dtype=model.dtype)
    listed = array(1, _PAGES)
    table = PageTable(listed, array(1), listed if spread else None)
    batch = kernels.LayerQueries(
        array(1, tokens, c.num_attention_heads // split, c.head_dim, dtype=model.dtype),
        LayerMemory(pool, pool, table, covered=array(1)),
        array(1),
    )
    return kernels.choose(plan, batch, model.target)
