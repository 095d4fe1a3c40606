"""A loop inside shard_map whose carry begins with a constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import alaya_jax as aj
from alaya_jax.pallas_kernels.sharded import vary_like


def total(x, start):
    return lax.fori_loop(0, x.shape[0], lambda i, carry: carry + x[i], start)


def over_devices(body, *arrays):
    mesh = aj.make_mesh(tensor=2, data=4)
    some = PartitionSpec("tensor")
    run = jax.shard_map(body, mesh=mesh, in_specs=some, out_specs=some)
    return run(*arrays)


def test_a_constant_alone_is_no_carry_and_one_that_varies_is():
    x = jnp.arange(8.0).reshape(4, 2)
    with pytest.raises(TypeError):
        over_devices(lambda x: total(x, jnp.zeros(2))[None], x)
    found = over_devices(lambda x: total(x, vary_like(jnp.zeros(2), x))[None], x)
    np.testing.assert_array_equal(found, [[2, 4], [10, 12]])


def test_every_leaf_varies_like_all_inputs_together():
    def body(x):
        start = vary_like({"a": jnp.zeros(2), "b": x[0]}, x, {"other": jnp.ones(3)})
        axes = {name: jax.typeof(leaf).manual_axis_type.varying for name, leaf in start.items()}
        assert axes == {"a": {"tensor"}, "b": {"tensor"}}
        return x

    over_devices(body, jnp.arange(8.0).reshape(4, 2))


def test_outside_shard_map_nothing_changes():
    start = {"a": jnp.zeros(2)}
    found = vary_like(start, jnp.ones(3))
    np.testing.assert_array_equal(found["a"], start["a"])
