import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from alaya_jax.errors import AlayaError, KernelError
from alaya_jax.pallas_kernels import dispatch
from alaya_jax.pallas_kernels.dispatch import CPU, H100, Candidate, Op, Target


def unfit_fast(target, x, **_):
    return dispatch.not_a_hopper(target) or (None if x.shape[0] % 8 == 0 else "rows not 8n")


OP = Op(
    "double",
    (
        Candidate("mosaic_gpu", unfit_fast, lambda x, target: x * 2 + 100, wants_target=True),
        Candidate("xla", None, lambda x: x * 2),
        Candidate("reference", None, lambda x: x + x + 1000, automatic=False),
    ),
)
X = jax.ShapeDtypeStruct((16,), jnp.float32)


def test_the_fastest_that_fits_is_chosen_and_the_reasons_are_kept():
    assert OP.choose(X, target=H100).implementation == "mosaic_gpu"
    choice = OP.choose(X, target=CPU)
    assert choice.implementation == "xla"
    assert "the platform is cpu" in str(choice)
    assert "sm_100" in str(OP.choose(X, target=dispatch.B200))
    assert "unknown" in str(OP.choose(X, target=Target("gpu")))


def test_one_error_holds_every_reason():
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(KernelError, match="rows not 8n") as e:
        OP.choose(x, implementation="mosaic_gpu", target=H100)
    assert "'xla' or 'reference'" in str(e.value)
    assert isinstance(e.value, AlayaError)
    never = Op(
        "never",
        (
            Candidate("mosaic_gpu", lambda *_: "reason one", print),
            Candidate("xla", lambda *_: "reason two", print),
            Candidate("reference", lambda *_: None, print, automatic=False),
        ),
    )
    with pytest.raises(KernelError, match=r"(?s)'reference'.*reason one.*reason two"):
        never.run(X)
    with pytest.raises(KernelError, match="no such implementation"):
        Op("double", OP.candidates[:2]).choose(X, implementation="reference")
    with pytest.raises(KernelError, match="not one of mosaic_gpu, xla, reference"):
        OP.choose(X, implementation="triton")


def test_runs_what_was_chosen_under_jit_and_shard_map():
    x = jnp.arange(16.0)
    np.testing.assert_array_equal(jax.jit(OP.run)(x), 2 * x)
    np.testing.assert_array_equal(OP.run(x, implementation="reference"), 2 * x + 1000)
    np.testing.assert_array_equal(OP.run(x, target=dispatch.INTERPRET), 2 * x + 100)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    spec = PartitionSpec("data")
    sharded = jax.shard_map(OP.run, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(jax.jit(sharded)(x), 2 * x)


@pytest.mark.parametrize(
    ("kind", "capability"),
    [("NVIDIA H100 80GB HBM3", (9, 0)), ("NVIDIA GH200 480GB", (9, 0)), ("NVIDIA B200", (10, 0))],
)
def test_the_target_is_that_of_the_mesh_in_context(kind, capability):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=device)
    assert dispatch.current_target() == CPU
    seen = []
    spec = PartitionSpec("data")

    def f(x):
        seen.append(dispatch.current_target())
        return x

    jax.eval_shape(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec), X)
    assert seen == [Target("gpu", capability)]
