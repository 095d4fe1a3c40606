"""Bytes a key, against the arrays that hold them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import alaya_jax as aj
from alaya_jax.cache import PagedKV
from alaya_jax.optimizer.key_bytes import KeyBytes

PAGES = 4
RANGE = aj.DIPR(beta=1.0)


@pytest.mark.parametrize("size", [7, 16])
@pytest.mark.parametrize(
    "plan",
    [
        aj.Plan(RANGE, aj.Sketch()),
        aj.Plan(RANGE, aj.Sketch(2, "learnt")),
        aj.Plan(RANGE, aj.Sketch(0.5, "learnt")),
        aj.Plan(aj.TopK(64), aj.Block(), by="page"),
    ],
    ids=lambda plan: repr(plan.index),
)
def test_what_arrays_hold(tiny_model, plan, size):
    config = dataclasses.replace(tiny_model.config, head_dim=64)
    found = KeyBytes.of(plan, config, size, jnp.bfloat16)
    layer = plan.index.create(config, PAGES, size, jnp.bfloat16)
    held = sum(x.nbytes for x in jax.tree.leaves(layer))
    assert found.indexes == {repr(plan.index): pytest.approx(held / (PAGES * size))}
    kv = PagedKV.create(config, PAGES, size, jnp.bfloat16)
    assert found.kv == (kv.k[0].nbytes + kv.v[0].nbytes) / (PAGES * size)


def test_what_keeps_nothing_is_not_named(tiny_model):
    found = KeyBytes.of(aj.Plan(aj.Full()), tiny_model.config, 16, jnp.float32)
    assert found.indexes == {}
    assert str(found) == f"a key and its value take {found.kv} B a layer"
