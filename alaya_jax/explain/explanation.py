"""What was asked of the keys and what was really read: the account behind `Session.explain`."""

import dataclasses
import html
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from alaya_jax import show, units
from alaya_jax.errors import RequestError
from alaya_jax.explain.analysis import Analysis
from alaya_jax.explain.dataframe import dataframe
from alaya_jax.explain.reads import Reads, plan_fields
from alaya_jax.optimizer.choice import PlanChoice
from alaya_jax.optimizer.key_bytes import KeyBytes
from alaya_jax.optimizer.prefill import PrefillChoice
from alaya_jax.query.origin import Origin
from alaya_jax.query.plan import of_layer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


HEAT_MAPS = {
    "recovery": "share of the attention mass",
    "error": "|out - full| / |full|",
    "error_estimated": "|out - full| / |full|",
    "attended": "keys attended to",
    "keys_needed": "keys outside the window",
    "beta": "range of raw scores",
    "beta_needed": "range of raw scores",
    "mass_estimated": "share of the attention mass",
}
"""What `Explanation.plot` can show -> its unit."""


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What a session did, or would do. `str()` is a table, `to_dict()` plain data; a rich console
    and a notebook show it in their own way.

    Attributes:
      tokens, reused: of each sequence, in the cache and from a stored context.
      contexts: ids of those contexts, or None.
      origins: how the keys and values in the cache were computed.
      phases: "prefill", "decode" (and "attention" for a model of your own) -> `Reads`.
      planned: what would run, one row a layer; see `planned_rows`.
      choice: why, where `Auto` chose.
      analysis: one token's attention run again, where that was asked for.
      prefill: why a prefill did what it did, where `Auto` chose.
      in_files: tokens of each sequence that are read where they lie in the database's files; None:
        none are.
      placed: why.
      sketch: in which basis sketches round keys, where plans ask any.
      bytes_a_key: of keys, values and what the plans' indexes keep of them, where they ask any.
      index_bytes: what each index and graph takes beside the pages, for all sessions together, by
        account; see `DatabaseStats.bytes_beside`.
    """

    tokens: list[int]
    reused: list[int]
    contexts: list[str | None]
    origins: list[Origin]
    phases: dict[str, Reads]
    planned: list[dict[str, Any]] | None = None
    choice: PlanChoice | None = None
    analysis: Analysis | None = None
    prefill: PrefillChoice | None = None
    in_files: list[int] | None = None
    placed: str = ""
    sketch: str = ""
    bytes_a_key: KeyBytes | None = None
    index_bytes: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": self.tokens,
            "reused": self.reused,
            "in_files": self.in_files,
            "placed": self.placed or None,
            "sketch": self.sketch or None,
            "bytes_a_key": self.bytes_a_key and self.bytes_a_key.to_dict(),
            "index_bytes": self.index_bytes,
            "contexts": self.contexts,
            "exact": [o.exact(n) for o, n in zip(self.origins, self.tokens, strict=True)],
            "origins": [[{"from": n, "plan": p} for n, p in o.runs] for o in self.origins],
            "phases": {name: reads.to_dict() for name, reads in self.phases.items()},
            "planned": self.planned,
            "choice": self.choice and self.choice.to_dict(),
            "prefill_choice": self.prefill and self.prefill.to_dict(),
            "analysis": self.analysis and self.analysis.to_dict(),
        }

    def to_dataframe(self) -> "DataFrame":
        """A row for each phase and layer, of pandas; the columns are `dataframe.COLUMNS`.

        Figures are means over query tokens and heads; of what a phase does not know, NaN.

        Raises:
          RequestError: pandas is not installed.
        """
        return dataframe(self.phases, self.planned, self.analysis)

    def selected(self, layer: int, head: int, *, window: bool = False) -> np.ndarray:
        """Positions that a head of the analyzed token attended to, ascending int.

        Args:
          layer, head: from 0.
          window: those of the window (first and last tokens) too.

        Raises:
          RequestError: nothing was analyzed, or there is no such layer or head.
        """
        found = self._analyzed("selected")
        kept = found.positions if window else found.retrieved
        if not (0 <= layer < len(kept) and 0 <= head < len(kept[0])):
            raise RequestError(
                f"selected({layer}, {head}): layers 0 to {len(kept) - 1}, query heads 0 to "
                f"{len(kept[0]) - 1}"
            )
        return kept[layer][head]

    def selected_text(
        self, layer: int, head: int, *, window: bool = False
    ) -> list[tuple[int, str]]:
        """`selected`, each position with the text of its token.

        Raises:
          RequestError: as `selected`; or the model has no tokenizer.
        """
        return self._analyzed("selected_text").text(self.selected(layer, head, window=window))

    def plot(self, what: str = "recovery") -> "Figure":
        """A heat map, layer by head, of a figure that `analyze=True` found.

        "attended", "mass_estimated" and "error_estimated" are known without it, as means over the
        tokens decoded.

        Raises:
          RequestError: it is no such figure or not known, or matplotlib is not installed.
        """
        if what not in HEAT_MAPS:
            raise RequestError(f"plot({what!r}): use one of {sorted(HEAT_MAPS)}")
        if self.analysis is not None:
            name = "estimated" if what == "mass_estimated" else what
            values, of = getattr(self.analysis, name), f"token {self.analysis.position:,}"
        elif what in ("attended", "mass_estimated", "error_estimated") and self.phases:
            phase = "decode" if "decode" in self.phases else next(iter(self.phases))
            values, of = self.phases[phase].mean(what), f"mean over {phase}"
        else:
            self._analyzed(f"plot({what!r})")
            raise AssertionError
        return show.heat_map(values, f"{what.replace('_', ' ')}, {of}", HEAT_MAPS[what])

    def _analyzed(self, what: str) -> Analysis:
        if self.analysis is None:
            raise RequestError(f"{what} needs session.explain(analyze=True)")
        return self.analysis

    def tables(self) -> list[show.Table]:
        """One for each phase, or of the plan; and of the analysis."""
        why = {"prefill": self.prefill.reason} if self.prefill else {}
        if self.choice and self.choice.graph:
            why |= dict.fromkeys(("decode", "attention"), self.choice.graph)
        found = []
        for name, reads in self.phases.items():
            found.append(_reads_table(name, reads, why.get(name)))
            if reads.tier == "host":
                found.append(_pages_table(name, reads.to_dict()))
        if self.planned is not None:
            found.append(_planned_table(self.planned, self.choice))
        if self.analysis is not None:
            found.append(_analysis_table(self.analysis, self.choice))
        return found

    @property
    def heading(self) -> str:
        """Which tokens this is about."""
        head = f"tokens {self.tokens}, of which from stored contexts {self.reused}"
        if self.in_files is not None:
            head += f"\nread where they lie in the database's files {self.in_files}"
            head += f" ({self.placed})" if self.placed else ""
        if self.sketch:
            head += f"\nsketches round keys in {self.sketch}"
        if self.bytes_a_key is not None:
            head += f"\n{self.bytes_a_key}"
        if self.index_bytes:
            each = ", ".join(f"{x} {units.nbytes(n)}" for x, n in self.index_bytes.items())
            head += f"\nbeside the pages of all sessions: {each}"
        for b, origin in enumerate(self.origins):
            if origin.runs:
                head += f"\nkeys and values of sequence {b}: {origin}"
        return head

    def __str__(self) -> str:
        return "\n\n".join([self.heading, *map(str, self.tables())])

    __repr__ = __str__

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield self.heading
        yield from (table.to_rich(options.max_width) for table in self.tables())

    def _repr_html_(self) -> str:
        tables = "".join(table.to_html() for table in self.tables())
        return f"<div>{html.escape(self.heading)}</div>{tables}"


def _reads_table(name: str, reads: Reads, why: str | None) -> show.Table:
    d = reads.to_dict()
    index = f"index {d['index']}" if d["index"] else "no index"
    share = d["keys_attended_per_step"] / max(d["keys_visible_per_step"], 1)
    title = (
        f"{name}: {_brief(d['query'])}, {index}, {d['implementation']}, pages on {d['tier']}, "
        f"{d['steps']} query tokens"
    )
    notes = [
        f"keys a query token and head: {d['keys_visible_per_step']:,.1f} visible, "
        f"{d['keys_scanned_per_step']:,.1f} scored, {d['keys_attended_per_step']:,.1f} "
        f"attended ({share:.1%})"
    ]
    if why is not None:
        notes.append(why)
    for reason in dict.fromkeys(
        given
        for row in d["by_layer"]
        if row["platform"] == "gpu"
        for given in row["passed_over"].items()
    ):
        notes.append(f"not by {reason[0]}: {reason[1]}")
    if d["searches_widened"]:
        notes.append(
            f"{d['searches_widened']:,} searches (of a token, head and layer) met more than they "
            "could list, and all keys were scanned: raise Graph(capacity=...)"
        )
    if d["mass_estimated"] is not None and d["index"]:
        notes.append(f"attention mass kept, by estimate: {d['mass_estimated']:.3f}")
    if d["error_estimated"] is not None:
        notes.append(f"error of the output, by estimate: {d['error_estimated']:.2%}")
    rows = [
        (
            _short(row),
            units.count(np.mean(row["keys_scanned"])),
            _spread(row["keys_read_by_group"]),
            _spread(row["keys_attended"]),
            units.share(row["mass_estimated"] and min(row["mass_estimated"])),
            units.nbytes(row["bytes"]),
        )
        for row in d["by_layer"]
    ]
    columns = ("layer", "<plan", "scored", "read (by kv head)", "attended (by head)")
    columns = (*columns, "least est. mass", "bytes a token")
    return show.Table(title, columns, show.alike(rows), tuple(notes))


def _pages_table(name: str, d: dict[str, Any]) -> show.Table:
    """Where the pages were that a phase met."""

    def row(pages: dict[str, Any]) -> tuple[str, ...]:
        rate = pages["hit_rate"]
        counts = (units.count(pages[name]) for name in ("met", "pool", "memory", "disk"))
        sizes = (units.nbytes(pages[name]) for name in ("bytes_read", "bytes_verified"))
        return (*counts, "-" if rate is None else f"{rate:.1%}", *sizes)

    columns = ("layer", "met", "in the pool", "in memory", "from disk", "hit rate", "read")
    columns = (*columns, "verified")
    rows = show.alike([row(one["pages"]) for one in d["by_layer"]])
    title = f"{name}: pages of a kv head, each time it was met, {d['steps']} query tokens"
    notes = (
        "of mapped pages, in memory: met before and not let go of since (Budget(host=...)), by "
        "the session's own account",
    )
    return show.Table(title, columns, [*rows, ("all", *row(d["pages"]))], notes)


def _planned_table(planned: list[dict[str, Any]], choice: PlanChoice | None) -> show.Table:
    if choice is None:
        rows = show.alike([(_short(row), row["tier"]) for row in planned])
        return show.Table("plan (nothing has run)", ("layer", "<plan", "<tier"), rows)
    return choice.table()


def _analysis_table(found: Analysis, choice: PlanChoice | None) -> show.Table:
    columns = ["layer", "<plan", "attended (by head)", "needed", "recovery: mean", "least"]
    columns += ["error: mean", "most", "beta needed", "time", "full"]
    if choice is not None:
        columns.append("predicted")
    rows = []
    for i in range(len(found.seconds)):
        row = (
            str(i),
            _short(plan_fields(of_layer(found.plans, i))),
            _spread(found.attended[i]),
            _spread(found.keys_needed[i]),
            units.share(found.recovery[i].mean()),
            units.share(found.recovery[i].min()),
            f"{found.error[i].mean():.2%}",
            f"{found.error[i].max():.2%}",
            _spread(found.beta_needed[i]),
            units.seconds(found.seconds[i]),
            units.seconds(found.seconds_full[i]),
        )
        if choice is not None:
            row = (*row, units.seconds(choice.layers[i].seconds))
        rows.append(row)
    notes = (
        f"needed: keys outside the window, and their range, that hold {found.wanted:g} of the mass",
        f"attention of all layers: {units.seconds(found.seconds.sum())}, "
        f"in full {units.seconds(found.seconds_full.sum())} (each layer a call of its own)",
    )
    if not np.isnan(found.error_asked).all():
        asked, broken = ~np.isnan(found.error_asked), found.violations
        notes = (
            *notes,
            f"error asked for: at most {np.nanmax(found.error_asked):.2%}; estimated "
            f"{np.nanmean(found.error_estimated[asked]):.2%} in the mean and true "
            f"{found.error[asked].mean():.2%}; larger than asked in {broken.sum()} of "
            f"{asked.sum()} heads",
        )
    title = f"analysis of the query at position {found.position:,} of sequence {found.sequence}"
    return show.Table(title, tuple(columns), rows, notes)


def _spread(values: Any) -> str:
    low, high = float(np.min(values)), float(np.max(values))
    return units.count(low) if low == high else f"{units.count(low)} to {units.count(high)}"


def _brief(query: str) -> str:
    """Without the window and what was left open, which would fill the line."""
    return re.sub(r"(window=Window\([^)]*\)|\w+=None)(, )?", "", query).replace(", )", ")")


def _short(row: dict[str, Any]) -> str:
    words = [_brief(row["query"])]
    if row["index"]:
        words.append(f"@ {row['index']}")
    if row["by"] == "page":
        words.append("by page")
    if row["share"] not in (None, "head"):
        words.append(f"a {row['share']}")
    return " ".join(words)
