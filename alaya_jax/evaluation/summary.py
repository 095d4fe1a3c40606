"""What a run found: a row for each policy, of the questions that full attention answers."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from alaya_jax import show
from alaya_jax.evaluation.statistics import bootstrap, mcnemar

REFERENCE = "recovery"
"""The policy that the others are compared with."""

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of a run.

    Attributes:
      policies: a row each; see `_policy`.
      tasks: for each task the questions, how many of them full attention answers, and the score
        of each policy on these.
      questions, answered: of the run, and those that full attention answers fully.
      done, total: answers that there are, and that there will be.
    """

    policies: list[dict[str, Any]]
    tasks: list[dict[str, Any]]
    questions: int
    answered: int
    done: int
    total: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def table(self) -> show.Table:
        """The policies, for people."""
        columns = ("<policy", "keys", "score", "kept", "mass", "worst 1%", "KL", "top-1", "p")
        rows = [
            (
                row["policy"],
                f"{row['keys_share']:.1%}",
                f"{row['score_all']:.3f}",
                _number(row["score"], "{:.3f}"),
                f"{row['mass']:.3f}",
                f"{row['mass_worst']:.3f}",
                f"{row['kl']:.4f}",
                f"{row['top1']:.1%}",
                _number(row["p"], "{:.2g}"),
            )
            for row in self.policies
        ]
        return show.Table(f"{self.questions} questions", columns, rows, tuple(self.notes))

    @property
    def notes(self) -> list[str]:
        """What the columns mean, and what was left out."""
        left = self.questions - self.answered
        return [
            "keys: that a head reads, of those there are, in layers that the policy makes sparse",
            f"score: of all questions; kept: of the {self.answered} that full attention answers "
            f"({left} that it fails are left out of it, and of p)",
            "mass: share of the attention mass read, mean over heads and questions, and the worst "
            "1%; KL (nats) and top-1: of the next token, beside full attention's",
            f"p: McNemar's exact test against {REFERENCE}",
        ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def summarize(rows: Iterable[Row], names: Iterable[str], total: int) -> Summary:
    """Summarizes answers of which some may be missing; a policy without any has no row.

    Args:
      rows: lines of `Answers`.
      names: of policies, in order.
      total: answers that there will be.
    """
    found = list(rows)
    by_policy = {name: {r["item"]: r for r in found if r["policy"] == name} for name in names}
    full = by_policy.get("full", {})
    solved = {item for item, row in full.items() if row["score"] == 1}
    reference = by_policy.get(REFERENCE, {})
    policies = [
        _policy(name, rows, reference, full, solved) for name, rows in by_policy.items() if rows
    ]
    tasks = []
    for task in dict.fromkeys(row["task"] for row in found):
        asked = {item for item, row in full.items() if row["task"] == task}
        of = asked & solved
        scores = {
            name: _mean([rows[item]["score"] for item in of if item in rows])
            for name, rows in by_policy.items()
        }
        tasks.append({"task": task, "questions": len(asked), "answered": len(of), "score": scores})
    return Summary(policies, tasks, len(full), len(solved), len(found), total)


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _policy(
    name: str,
    rows: Mapping[str, Row],
    reference: Mapping[str, Row],
    full: Mapping[str, Row],
    solved: set[str],
) -> dict[str, Any]:
    """A policy's row: means over its questions."""
    mass = np.concatenate([np.asarray(row["mass"]).ravel() for row in rows.values()])
    error = np.concatenate([np.asarray(row["error"]).ravel() for row in rows.values()])
    ours = [item for item in rows if item in solved]
    beside = [item for item in ours if item in reference]
    right = {item: rows[item]["score"] == 1 for item in beside}
    known = {item: reference[item]["score"] == 1 for item in beside}
    lost = sum(known[item] and not right[item] for item in beside)
    gained = sum(right[item] and not known[item] for item in beside)
    there = [item for item in rows if item in full]
    both = [rows[item]["score"] - full[item]["score"] for item in there]
    base = _mean([full[item]["score"] for item in there])
    own = _mean([rows[item]["score"] for item in there])
    texts = [rows[item]["text"] for item in there]
    return {
        "policy": name,
        "questions": len(rows),
        "score_all": _mean([row["score"] for row in rows.values()]),
        "score": _mean([rows[item]["score"] for item in ours]),
        "retention": own / base if base and own is not None else None,
        "difference": _mean(both),
        "difference_95": list(bootstrap(both, texts)) if both else None,
        "lost_to_reference": lost,
        "gained_on_reference": gained,
        "p": mcnemar(lost, gained) if beside and name != REFERENCE else None,
        "keys": _mean([row["keys"] for row in rows.values()]),
        "keys_share": _mean([row["keys"] / row["visible"] for row in rows.values()]),
        "keys_all_share": _mean([row["keys_all"] / row["visible"] for row in rows.values()]),
        "mass": float(mass.mean()),
        "mass_worst": float(np.quantile(mass, 0.01)),
        "error": float(error.mean()),
        "error_p99": float(np.quantile(error, 0.99)),
        "kl": float(np.mean([np.mean(row["kl"]) for row in rows.values()])),
        "kl_worst": float(np.max([np.max(row["kl"]) for row in rows.values()])),
        "top1": _mean([row["top1"] for row in rows.values()]),
        "seconds": _mean([row["seconds"] for row in rows.values()]),
    }
