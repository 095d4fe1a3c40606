import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from alaya_jax.errors import KernelError
from alaya_jax.pallas_kernels import mosaic
from alaya_jax.pallas_kernels.dispatch import H100, INTERPRET

from .conftest import RACE


def copy(where, x_ref, out_ref, smem, arrived):
    """Each of two blocks copies one row to a row of its own, or both to the same."""
    block = lax.axis_index("block")
    plgpu.copy_gmem_to_smem(x_ref.at[block], smem, arrived)
    plgpu.barrier_wait(arrived)
    out_ref[where(block)] = smem[...]


def run(where):
    x = jnp.arange(256.0).reshape(2, 128)
    kernel = plgpu.kernel(
        functools.partial(copy, where),
        out_type=jax.ShapeDtypeStruct((2, 128), jnp.float32),
        scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
        grid=(2,),
        grid_names=("block",),
        interpret=mosaic.interpret(INTERPRET),
    )
    return x, kernel(x)


def test_a_race_is_reported(capsys):
    """Without this, that no other test has one would mean nothing. jax 0.11 prints, 0.12 raises."""
    said = ""
    try:
        jax.block_until_ready(run(lambda block: block * 0)[1])
    except jax.errors.JaxRuntimeError as e:
        said = str(e)
    assert RACE in said + capsys.readouterr().out


def test_no_race_is_reported_where_there_is_none(capsys):
    x, out = run(lambda block: block)
    np.testing.assert_array_equal(out, x)
    assert RACE not in capsys.readouterr().out


def test_a_copy_that_leaves_the_next_one_unaligned_is_refused():
    """A device stops there; the simulator and the compiler do not."""

    def kernel(x_ref, out_ref, smem, arrived):
        mosaic.bring(x_ref.at[pl.ds(0, 16)], smem.at[pl.ds(0, 16)], arrived)
        plgpu.barrier_wait(arrived)
        out_ref[...] = smem[...]

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
        interpret=mosaic.interpret(INTERPRET),
    )
    with pytest.raises(KernelError, match="64 bytes"):
        run(jnp.zeros(128))


def test_only_the_simulator_interprets():
    assert mosaic.interpret(H100) is None


@pytest.mark.parametrize(
    ("swizzle", "itemsize", "columns"), [(128, 2, 64), (64, 2, 32), (128, 1, 128)]
)
def test_a_tile_is_eight_rows_of_a_swizzle(swizzle, itemsize, columns):
    tiling, swizzled = mosaic.swizzled(swizzle, itemsize)
    assert tiling.tiling == (8, columns)
    assert swizzled.swizzle == swizzle
