"""A run as one page of HTML, with its plots inside: it needs no other file, and no network."""

import html
import io
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from alaya_jax import show
from alaya_jax.errors import RequestError
from alaya_jax.evaluation.summary import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .7rem }
td + td, th + th { text-align: right } thead { border-bottom: 1px solid #888 }
svg { max-width: 100%; height: auto } .note { color: #666 }
"""


def require_plots() -> None:
    """Raises RequestError where plots cannot be drawn: better before a run than behind it."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise RequestError(
            "the report's plots need matplotlib: pip install 'alaya_jax[plot]'"
        ) from error
    del matplotlib


def page(summary: Summary, rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """The report of a run.

    Args:
      summary: of it.
      rows: lines of `Answers`.
      settings: of it, as they are on disk.

    Raises:
      RequestError: matplotlib is not installed.
    """
    require_plots()
    found = list(rows)
    title = f"{settings['model']}, suite {settings['suite']}"
    state = f"{summary.done:,} of {summary.total:,} answers"
    parts = [
        f"<h1>{html.escape(title)}</h1><p>{state}</p>",
        summary.table().to_html(),
        "<h2>Score against keys read</h2>",
        _svg(_scatter(summary)),
        "<h2>By task</h2>",
        _tasks(summary).to_html(),
        "<h2>Share of the attention mass read, by layer and query head</h2>",
        _svg(_heads(summary, found)),
        "<h2>Settings</h2>",
        show.Table(
            "", ("<setting", "<value"), [(name, str(value)) for name, value in settings.items()]
        ).to_html(),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _tasks(summary: Summary) -> show.Table:
    """The score of each policy on the questions of each task that full attention answers."""
    names = [row["policy"] for row in summary.policies]

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return show.Table(
        "Of the questions that full attention answers",
        ("<task", "questions", "answered", *names),
        [
            (
                task["task"],
                str(task["questions"]),
                str(task["answered"]),
                *(cell(task["score"][name]) for name in names),
            )
            for task in summary.tasks
        ],
    )


def _scatter(summary: Summary) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, row in enumerate(summary.policies):
        at, style = row["keys_all_share"], {"color": f"C{i % 10}", "label": row["policy"]}
        if row["score"] is not None:
            left.plot(at, row["score"], "o", **style)
        right.plot(at, row["mass"], "o", **style)
        right.vlines(at, row["mass_worst"], row["mass"], colors=style["color"], linewidths=1)
    for axes, what in (
        (left, "score of what full answers"),
        (right, "mass read, down to the worst 1%"),
    ):
        axes.set(xlabel="keys read, share of all, all layers", ylabel=what, ylim=(-0.03, 1.03))
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return figure


def _heads(summary: Summary, rows: list[Mapping[str, Any]]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = [row["policy"] for row in summary.policies if row["policy"] != "full"]
    means = [
        np.mean([np.asarray(row["mass"]) for row in rows if row["policy"] == name], axis=0)
        for name in names
    ]
    columns = min(4, max(1, len(names)))
    lines = -(-max(1, len(names)) // columns)
    figure = Figure(figsize=(2.4 * columns + 1, 2.8 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    image = None
    for axis in axes.ravel()[len(names) :]:
        axis.set_axis_off()
    for axis, name, mean in zip(axes.ravel(), names, means, strict=False):
        image = axis.imshow(mean, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set(title=name, xlabel="head", ylabel="layer")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(MaxNLocator(integer=True))
    if image is not None:
        figure.colorbar(image, ax=axes, label="share of the mass", shrink=0.6)
    return figure


def _svg(figure: "Figure") -> str:
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": "alaya", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.DOTALL)
