"""Which implementation answers a plan, without running it."""

import dataclasses

import pytest

import alaya_jax as aj
from alaya_jax.errors import AlayaError
from alaya_jax.explain.implementation import implementation_of
from alaya_jax.query.plan import Plan


def test_a_kernel_that_is_passed_over_has_its_reason(tiny_model):
    chosen = implementation_of(Plan(aj.Full()), tiny_model, 16)
    assert chosen.target.platform == "cpu"
    assert chosen.implementation not in dict(chosen.passed_over)
    assert all(reason for _, reason in chosen.passed_over)


def test_one_that_is_named_and_cannot_is_refused(tiny_model):
    names = [name for name, _ in implementation_of(Plan(aj.Full()), tiny_model, 16).passed_over]
    assert "mosaic_gpu" in names
    plan = dataclasses.replace(Plan(aj.Full()), implementation="mosaic_gpu")
    with pytest.raises(AlayaError, match="mosaic_gpu"):
        implementation_of(plan, tiny_model, 16)
