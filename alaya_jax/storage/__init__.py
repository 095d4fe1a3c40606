"""Contexts at rest: the interface the database uses, and a directory that implements it."""

from alaya_jax.storage.interface import (
    Collected,
    ContextHeader,
    ContextRecord,
    ContextStore,
    IndexRecord,
    MappedContext,
    Source,
    StoreStats,
)
from alaya_jax.storage.pool_store import PoolStore

__all__ = [
    "Collected",
    "ContextHeader",
    "ContextRecord",
    "ContextStore",
    "IndexRecord",
    "MappedContext",
    "PoolStore",
    "Source",
    "StoreStats",
]
