"""Contexts whose model an earlier version told by samples of its weights."""

import dataclasses
import hashlib

import pytest

from alaya_jax.storage.interface import ContextHeader, ContextRecord
from alaya_jax.storage.sampled import UNKNOWN_MODEL, named, of_samples

OLD = hashlib.sha256(b"samples").hexdigest()


def record(fingerprint, problem=None):
    header = ContextHeader(
        fingerprint=fingerprint,
        dtype="float32",
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        page_size=16,
    )
    return ContextRecord(id="one", header=header, num_tokens=3, created=1.0, problem=problem)


@pytest.mark.parametrize(
    ("fingerprint", "old"),
    [
        (OLD, True),
        (OLD + "-int8", True),
        ("bytes:" + OLD, False),
        (OLD[:63], False),
        (OLD.upper().replace("0", "A"), False),
        ("tiny", False),
    ],
)
def test_a_fingerprint_of_samples_is_bare_hexadecimal(fingerprint, old):
    assert of_samples(fingerprint) is old
    assert named(record(fingerprint)).problem == (UNKNOWN_MODEL if old else None)


def test_a_problem_that_is_known_stays_and_so_does_the_rest():
    assert named(record(OLD, "damaged")).problem == "damaged"
    unreadable = ContextRecord(id="two", header=None, num_tokens=0, created=0.0)
    assert named(unreadable) == unreadable
    assert dataclasses.replace(named(record(OLD)), problem=None) == record(OLD)
