"""Accounts of what was read, from counts made by hand."""

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.attention.counts import Counts
from alaya_jax.explain.reads import Reads, plan_fields, planned_rows
from alaya_jax.query.plan import Plan

WINDOW = aj.Window(sink=2, recent=6)


def counts(attended, scored=0, read=0, mass=np.nan):
    """Of llama-tiny's 2 layers, a batch of one and 4 heads."""
    return Counts.of((2, 1, 4), *(np.asarray(x) for x in (attended, scored, read, mass)))


def test_two_calls_add_up_and_figures_are_a_token(tiny_model):
    reads = Reads(Plan(aj.DIPR(beta=3.0, window=WINDOW)), tiny_model, 16)
    reads.add(counts(10, 40, 4, 0.5), visible=40, queries=1)
    reads.add(counts(30, 44, 8, 1.5), visible=44, queries=1)
    told = reads.to_dict()
    assert (reads.queries, reads.visible) == (2, 84)
    assert told["steps"] == 2
    assert told["keys_visible_per_step"] == 42
    assert told["keys_attended_per_step"] == 20
    assert told["keys_scanned_per_step"] == 42
    assert told["mass_estimated"] == pytest.approx(1.0)
    assert told["searches_widened"] == 0
    np.testing.assert_allclose(reads.mean("attended"), np.full((2, 4), 20))
    layer = reads.layer(1)
    assert layer["keys_attended"] == [20] * 4
    assert "DIPR" in layer["query"]


def test_bytes_of_full_attention_are_all_keys_and_values(tiny_model):
    reads = Reads(Plan(aj.Full()), tiny_model, 16)
    reads.add(counts(100, 100), visible=100, queries=1)
    # 2 layers, 2 kv heads, K and V, 16 numbers of 4 bytes, 100 keys.
    assert reads.to_dict()["bytes_per_step"] == 2 * 2 * 2 * 16 * 4 * 100


def test_an_account_is_of_its_plans(tiny_model):
    reads = Reads(Plan(aj.DIPR(beta=3.0, window=WINDOW)), tiny_model, 16)
    assert reads.is_of(Plan(aj.DIPR(beta=np.float32(3.0), window=WINDOW)))
    assert not reads.is_of(Plan(aj.DIPR(beta=4.0, window=WINDOW)))


def test_nothing_yet_is_no_division_by_zero(tiny_model):
    told = Reads(Plan(aj.Full()), tiny_model, 16).to_dict()
    assert told["steps"] == 0
    assert told["keys_attended_per_step"] == 0


def test_a_plan_as_columns():
    fields = plan_fields(Plan(aj.DIPR(beta=3.0, window=WINDOW), aj.Sketch()))
    assert fields["beta"] == 3.0
    assert fields["index"] == repr(aj.Sketch())
    assert fields["by"] is not None
    fields = plan_fields(Plan(aj.Full()))
    assert fields["index"] is fields["by"] is fields["share"] is fields["beta"] is None


def test_planned_rows_say_what_runs_where(tiny_model):
    rows = planned_rows(Plan(aj.Full()), tiny_model, 16, None)
    assert [row["layer"] for row in rows] == [0, 1]
    assert {row["platform"] for row in rows} == {"cpu"}
    assert {row["tier"] for row in rows} == {"device"}
