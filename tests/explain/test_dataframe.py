"""`session.explain().to_dataframe()` against `to_dict`."""

import sys

import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError
from alaya_jax.explain.dataframe import COLUMNS


@pytest.fixture
def explanation(db, rng):
    session, rest = db.create_session(rng.integers(32, 127, 60))
    window = aj.Window(4, 8)
    plan = aj.Plan(aj.TopK(3, window), aj.Flat())
    for _ in aj.generate(session, rest, max_new_tokens=4, attention=plan):
        pass
    return session.explain(analyze=True)


def test_rows_and_numbers(explanation):
    table, data = explanation.to_dataframe(), explanation.to_dict()
    assert list(table.columns) == list(COLUMNS)
    layers = len(data["analysis"]["layers"])
    assert table.groupby("phase", sort=False).size().to_dict() == dict.fromkeys(
        ["prefill", "decode", "analysis"], layers
    )
    for phase in ("prefill", "decode"):
        rows, reads = table[table.phase == phase], data["phases"][phase]
        assert rows.layer.tolist() == list(range(layers))
        assert (rows.steps == reads["steps"]).all()
        for column, name in (
            ("keys_visible", "keys_visible_per_step"),
            ("keys_scanned", "keys_scanned_per_step"),
            ("keys_attended", "keys_attended_per_step"),
            ("keys_read", "keys_read_per_step"),
        ):
            assert rows[column].mean() == pytest.approx(reads[name])
        assert rows.bytes.sum() == pytest.approx(reads["bytes_per_step"])
        assert rows.recovery.isna().all()
    decode = table[table.phase == "decode"]
    assert decode["query"].str.startswith("TopK(k=3").all()
    assert (
        decode.keys_attended_least.tolist() == decode.keys_attended_most.tolist() == [15] * layers
    )
    analysis = table[table.phase == "analysis"]
    assert analysis.recovery.mean() == pytest.approx(data["analysis"]["recovery_mean"])
    assert analysis.recovery_least.min() == pytest.approx(data["analysis"]["recovery_least"])
    assert np.isfinite(analysis[["error", "seconds", "seconds_full"]]).all(axis=None)


def test_without_pandas(explanation, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RequestError, match="pip install pandas"):
        explanation.to_dataframe()
