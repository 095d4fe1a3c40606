"""What of `make aot` can be tested without its packages: the tables, and that every case traces."""

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from alaya_jax.errors import KernelError
from alaya_jax.pallas_kernels import aot, dispatch, targets
from alaya_jax.pallas_kernels.compile_case import DEVICES

CASES = aot.all_cases()


def on(kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    )


def test_the_table_finds_every_operation_and_names_cases_apart():
    assert {case.name.split()[0] for case in CASES} >= {"paged_decode"}
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(set(case.targets) <= set(targets.NAMES) for case in CASES)
    assert set(DEVICES) >= set(targets.NAMES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_traces_for_its_device_and_no_other(case):
    with on("NVIDIA H100 80GB HBM3"):
        jax.eval_shape(case.call, *case.arguments)
    with on("NVIDIA B200"), pytest.raises(KernelError, match="sm_100"):
        jax.eval_shape(case.call, *case.arguments)
    with pytest.raises(KernelError, match="cpu"):
        jax.eval_shape(case.call, *case.arguments)


def test_a_missing_plugin_is_named(monkeypatch):
    from jax.experimental import topologies

    def missing(*_, **__):
        raise RuntimeError("no such platform")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(KernelError, match="make aot"):
        targets.mesh("h100", x=1)


def test_a_case_that_does_not_compile_is_a_fault_and_the_others_go_on(monkeypatch):
    """On a CPU nothing of the table compiles; the reason is kept."""
    mesh = jax.make_mesh((1,), ("x",), (AxisType.Auto,), devices=jax.devices()[:1])
    result = aot.compile_case(CASES[0], mesh, DEVICES["h100"])
    assert len(result.faults) == 1
    op = CASES[0].name.split()[0]
    assert f"does not compile: {op} cannot run on cpu" in result.faults[0]
    assert "FAULT" in "\n".join(aot.lines(result, DEVICES["h100"]))
    assert dispatch.current_target() == dispatch.CPU
