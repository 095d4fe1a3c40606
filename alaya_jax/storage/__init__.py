"""Contexts at rest: the interface the database uses, and a directory that implements it."""

from alaya_jax.storage.directory import DirectoryStore
from alaya_jax.storage.interface import (
    ContextHeader,
    ContextRecord,
    ContextStore,
    IndexRecord,
)

__all__ = ["ContextHeader", "ContextRecord", "ContextStore", "DirectoryStore", "IndexRecord"]
