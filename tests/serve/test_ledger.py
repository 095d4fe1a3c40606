"""Texts under way, and the last that ended."""

import json
import math

import pytest

from alaya_jax.engine import Result
from alaya_jax.engine.request import Times
from alaya_jax.serve.ledger import KEPT, Entry, Ledger


def result(**what) -> Result:
    times = Times(queued_s=0.1, first_token_s=None, decode_s=0.0, total_s=0.5)
    settings = {"keys_read": math.nan, "timing": times, "programs": 0} | what
    return Result(0, 3, (), "", (), "cancelled", 0, **settings)


def test_times_are_of_the_first_and_the_last_token(monkeypatch):
    clock = iter([10.0, 10.5, 10.75, 11.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    entry = Entry("a", "", "full", 3)
    assert entry.first_token_s is None
    for _ in range(3):
        entry.token(None)
    assert (entry.tokens, entry.first_token_s, entry.decode_s) == (3, 0.5, 1.0)
    assert entry.gaps == [0.25, 0.75]


def test_an_end_is_told_once_and_remembered():
    ended = []
    ledger = Ledger(ended.append)
    first, second, third = (Entry(id, "", "full", 3) for id in ("a", "b", "b"))
    for entry in (first, second, third):
        ledger.begin(entry)
    assert ledger.running == [first, second, third]
    ledger.end(second, ValueError("no luck"))
    ledger.end(first, result())
    assert ended == [second, first]
    assert ledger.running == [third]
    assert ledger.entries() == [third, first, second]
    assert ledger.entries("b") == [third, second]
    states = [entry.to_dict()["state"] for entry in ledger.entries()]
    assert states == ["running", "finished", "failed"]
    assert second.to_dict()["error"] == "no luck"
    said = first.to_dict()
    assert said["keys_read"] is None
    json.dumps(said, allow_nan=False)


def test_old_ones_are_forgotten():
    ledger = Ledger()
    for i in range(KEPT + 5):
        entry = Entry(str(i), "", "full", 1)
        ledger.begin(entry)
        ledger.end(entry, result())
    assert len(ledger.entries()) == KEPT
    assert ledger.entries("0") == []
    with pytest.raises(ValueError, match="not in"):
        ledger.end(entry, result())
