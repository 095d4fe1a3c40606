"""Measuring a machine: what is kept, and that the constants say something of the device."""

import dataclasses
import json

import numpy as np
import pytest

from alaya_jax.optimizer import bench, machine
from alaya_jax.optimizer.choice import was_busy
from alaya_jax.pallas_kernels.dispatch import Target


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALAYA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(machine, "_MEGABYTES", 4)
    monkeypatch.setattr(bench, "WIDTHS", 2)


@pytest.mark.slow
def test_a_machine_is_measured_once(tiny_model, monkeypatch, tmp_path):
    """Values are the device's; that all terms are there and finite is not."""
    found = machine.machine_for(tiny_model.config, np.float32, pages=True, graph=True)
    numbers = [x for x in dataclasses.astuple(found) if not isinstance(x, str)]
    assert np.isfinite(numbers).all()
    assert min(numbers) >= 0
    assert min(found.copy, found.matmul, found.weights, found.full, found.visit) > 0
    calls = []
    monkeypatch.setattr(
        machine, "measure", lambda config, *args, **_: calls.append(config) or found
    )
    for graph in (True, False):
        assert machine.machine_for(tiny_model.config, np.float32, graph=graph) == found
    assert calls == []
    # Another shape is another machine; a part of the heads, too.
    machine.machine_for(tiny_model.config, np.float32, tensor=2)
    machine.machine_for(tiny_model.config, np.float16)
    assert [c.num_key_value_heads for c in calls] == [1, 2]
    for file in (tmp_path / "cache" / "machine").iterdir():
        file.write_text(json.dumps({"of": "another", "machine": {}}))
    machine.machine_for(tiny_model.config, np.float32)
    assert len(calls) == 3, "what is not understood is measured again"


def test_a_graph_is_measured_when_one_is_asked(tiny_model, monkeypatch):
    """What was measured without one stays."""
    bare = machine.Machine("paper", *map(float, range(1, 10)))
    asked = []

    def measure(*args, graph, known, **_):
        asked.append((graph, known))
        return dataclasses.replace(known or bare, walk=1.0 if graph else None)

    monkeypatch.setattr(machine, "measure", measure)
    assert machine.machine_for(tiny_model.config, np.float32) == bare
    both = machine.machine_for(tiny_model.config, np.float32, graph=True)
    assert both == dataclasses.replace(bare, walk=1.0)
    assert machine.machine_for(tiny_model.config, np.float32) == both
    assert asked == [(False, None), (True, bare)]


def test_pages_are_measured_where_they_may_be_chosen(tiny_model, monkeypatch):
    """On a CPU if asked; elsewhere as a matter of course."""
    bare = machine.Machine("paper", *map(float, range(1, 11)))
    paged = dataclasses.replace(bare, page_scan=1.0)
    monkeypatch.setattr(machine, "measure", lambda *_, pages, **__: paged if pages else bare)
    assert machine.machine_for(tiny_model.config, np.float32) == bare
    hopper = Target("gpu", (9, 0))
    monkeypatch.setattr(machine, "current_target", lambda: hopper)
    assert machine.machine_for(tiny_model.config, np.float32) == paged
    assert machine.machine_for(tiny_model.config, np.float32, pages=False) == paged


def test_a_machine_is_measured_again_when_asked(tiny_model, monkeypatch):
    """With all that was kept of it."""
    quiet = machine.Machine("paper", *map(float, range(1, 10)), walk=1.0, visit=1.0)
    found = [dataclasses.replace(quiet, busy=0.9), quiet]
    asked = []

    def measure(*args, graph, known, **_):
        asked.append((graph, known))
        return found[len(asked) - 1]

    monkeypatch.setattr(machine, "measure", measure)
    first = machine.machine_for(tiny_model.config, np.float32, graph=True)
    assert "calibrate --machine" in was_busy(first)
    assert machine.machine_for(tiny_model.config, np.float32) == first
    assert machine.machine_for(tiny_model.config, np.float32, again=True) == quiet
    assert not was_busy(quiet)
    assert asked == [(True, None), (True, None)]


def test_how_busy_a_machine_is():
    assert 0 <= machine.busy_share(0.02) <= 1
