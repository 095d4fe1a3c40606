"""What was read, as a table of pandas: a row for each phase and layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from alaya_jax.errors import RequestError
from alaya_jax.explain.analysis import Analysis
from alaya_jax.explain.reads import Reads

if TYPE_CHECKING:
    from pandas import DataFrame


COLUMNS = {
    "phase": "prefill, decode, attention (a model of your own), planned, or analysis",
    "layer": "from 0",
    "query": "what was asked",
    "index": "what found it; None where nothing is looked for",
    "by": "key or page",
    "share": "whose keys are chosen together: head, group or layer",
    "implementation": "what ran, or would run",
    "steps": "query tokens that the means are over",
    "keys_visible": "keys that a query token sees, mean",
    "keys_scanned": "keys scored for it, mean over query heads",
    "keys_attended": "keys that its output is a mean of, mean over query heads",
    "keys_attended_least": "the same of the head with the fewest",
    "keys_attended_most": "and of the head with the most",
    "keys_read": "keys outside the window whose K was read, of all kv heads",
    "mass_estimated": "share of the attention mass by the index's estimate, mean over query heads",
    "error_estimated": "|out - full| / |full| by the index's estimate, mean over query heads",
    "searches_widened": "searches that had no room and were answered by a scan, over all heads",
    "bytes": "of keys and values (as they are computed with) and index, a query token, all heads",
    "pages_met": "pages of a kv head that were met, each time; None where none are mapped",
    "pages_pool": "of these, in the pool",
    "pages_memory": "of mapped files, met before and not let go of since",
    "pages_disk": "of mapped files, others",
    "hit_rate": "share of the mapped pages met that were in memory",
    "bytes_read": "keys and values that came into memory from mapped files",
    "bytes_verified": "keys and values that were compared with their checksums",
    "recovery": "analysis: the true share of the mass, mean over query heads",
    "recovery_least": "analysis: of the worst head",
    "error": "analysis: |out - full| / |full|, mean over query heads",
    "seconds": "analysis: of this layer's attention",
    "seconds_full": "analysis: of full attention",
}
"""Columns of `Explanation.to_dataframe`, and what they say."""


def dataframe(
    phases: Mapping[str, Reads],
    planned: list[dict[str, Any]] | None,
    analysis: Analysis | None,
) -> DataFrame:
    """The rows of `Explanation.to_dataframe`.

    Raises:
      RequestError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise RequestError(
            "to_dataframe() needs pandas, which is not installed: pip install pandas (to_dict() "
            "needs nothing)"
        ) from error
    rows = [
        _read(name, reads.layer(layer), reads)
        for name, reads in phases.items()
        for layer in range(len(reads.attended))
    ]
    rows += [{"phase": "planned", **_common(row)} for row in planned or ()]
    if analysis is not None:
        rows += [_analyzed(analysis.layer(i)) for i in range(len(analysis.seconds))]
    numbers = [c for c in COLUMNS if c not in _WORDS]
    table = pandas.DataFrame(rows, columns=list(COLUMNS))
    return table.astype(dict.fromkeys(numbers, "float64") | {"layer": "int64"})


_WORDS = ("phase", "query", "index", "by", "share", "implementation")


def _common(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("layer", *_WORDS[1:]) if name in row}


def _attended(counts: list[float]) -> dict[str, float]:
    return {
        "keys_attended": float(np.mean(counts)),
        "keys_attended_least": min(counts),
        "keys_attended_most": max(counts),
    }


def _mean(numbers: list[float] | None) -> float | None:
    return None if numbers is None else float(np.mean(numbers))


def _read(phase: str, row: dict[str, Any], reads: Reads) -> dict[str, Any]:
    return {
        "phase": phase,
        **_common(row),
        "steps": reads.queries,
        "keys_visible": reads.visible / max(reads.queries, 1),
        "keys_scanned": _mean(row["keys_scanned"]),
        **_attended(row["keys_attended"]),
        "keys_read": row["keys_read"],
        "mass_estimated": _mean(row["mass_estimated"]),
        "error_estimated": _mean(row["error_estimated"]),
        "searches_widened": sum(row["widened"]),
        "bytes": row["bytes"],
        **_pages(row["pages"] or {}),
    }


def _pages(pages: dict[str, Any]) -> dict[str, Any]:
    counts = {f"pages_{name}": pages.get(name) for name in ("met", "pool", "memory", "disk")}
    names = "hit_rate", "bytes_read", "bytes_verified"
    return counts | {name: pages.get(name) for name in names}


def _analyzed(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "phase": "analysis",
        "layer": row["layer"],
        "query": row["plan"],
        "steps": 1,
        "keys_visible": row["keys_visible"],
        "keys_scanned": _mean(row["keys_scanned"]),
        **_attended(row["keys_attended"]),
        "keys_read": float(sum(row["keys_read"])),
        "mass_estimated": _mean(row["mass_estimated"]),
        "error_estimated": _mean(row["error_estimated"]),
        "recovery": _mean(row["recovery"]),
        "recovery_least": min(row["recovery"]),
        "error": _mean(row["error"]),
        "seconds": row["seconds"],
        "seconds_full": row["seconds_full"],
    }
