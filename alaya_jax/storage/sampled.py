"""Contexts of versions whose fingerprints of models covered samples of the weights.

Weights that differed only elsewhere had the same fingerprint, so it does not say whose the keys
are.
"""

import dataclasses

from alaya_jax.storage.interface import ContextRecord

UNKNOWN_MODEL = (
    "stored by an earlier version, which told models apart by samples of their weights, so that "
    "whose keys these are is not known; import the document again, and remove this"
)


def of_samples(fingerprint: str) -> bool:
    """Whether a fingerprint is of samples: those of all bytes begin with a mark."""
    return len(fingerprint) >= 64 and set(fingerprint[:64]) <= set("0123456789abcdef")


def named(record: ContextRecord) -> ContextRecord:
    """The record, with this problem set where it applies."""
    if record.problem or record.header is None or not of_samples(record.header.fingerprint):
        return record
    return dataclasses.replace(record, problem=UNKNOWN_MODEL)
