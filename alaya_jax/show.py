"""Tables and heat maps of what attention read: for the terminal, a notebook, a file."""

import dataclasses
import html
import io
from typing import TYPE_CHECKING

import numpy as np

from alaya_jax.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group


_WIDTH = 80  # of a table's lines; those of words may be longer
_GAP = 3  # between columns, at most
_MARGIN = 4  # what a terminal's table takes beside its columns


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of texts under headings, one title above them and notes below.

    Attributes:
      title: one line.
      columns: headings; those that begin with "<" are of texts, aligned left.
      rows: one text a column.
      notes: lines below.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    def headings(self) -> list[str]:
        """Without the marks of alignment."""
        return [column.removeprefix("<") for column in self.columns]

    @property
    def _widths(self) -> list[int]:
        lines = [tuple(self.headings), *self.rows]
        return [max(map(len, column)) for column in zip(*lines, strict=True)]

    def parts(self, width: int) -> list["Table"]:
        """Tables one below the other that are no wider, each with the first column."""
        first, *widths = self._widths
        blocks: list[list[int]] = [[0]]
        taken = first
        for i, wide in enumerate(widths, 1):
            if taken + _GAP + wide > width and len(blocks[-1]) > 1:
                blocks.append([0])
                taken = first
            blocks[-1].append(i)
            taken += _GAP + wide
        last = len(blocks) - 1
        return [
            Table(
                self.title if not n else "",
                tuple(self.columns[i] for i in block),
                [tuple(row[i] for i in block) for row in self.rows],
                self.notes if n == last else (),
            )
            for n, block in enumerate(blocks)
        ]

    def __str__(self) -> str:
        return "\n\n".join(part._text() for part in self.parts(_WIDTH))

    def _text(self) -> str:
        left = [column.startswith("<") for column in self.columns]

        def line(row: tuple[str, ...]) -> str:
            cells = zip(row, self._widths, left, strict=True)
            return "  ".join(x.ljust(n) if to else x.rjust(n) for x, n, to in cells).rstrip()

        table = [line(tuple(self.headings)), *map(line, self.rows)]
        return "\n".join([*([self.title] if self.title else []), *table, *self.notes])

    def to_rich(self, width: int = 80) -> "Group":
        """For a terminal so wide."""
        from rich import box
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        def drawn(part: Table) -> Group:
            table = RichTable(box=box.SIMPLE_HEAD)
            for column, name in zip(part.columns, part.headings, strict=True):
                table.add_column(name, justify="left" if column.startswith("<") else "right")
            for row in part.rows:
                table.add_row(*map(Text, row))  # brackets in it are no markup
            # Not as the table's own title and caption, which are folded to its width.
            notes = [Text(note, style="italic") for note in part.notes]
            return Group(*([Text(part.title, style="italic")] if part.title else []), table, *notes)

        return Group(*map(drawn, self.parts(width - _MARGIN)))

    def to_html(self) -> str:
        """For a notebook."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.headings)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        return (
            f"<div><b>{html.escape(self.title)}</b></div><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>{notes}"
        )


def alike(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Numbers rows from 0, and joins neighbours that say the same: "3-7"."""
    joined: list[tuple[int, int, tuple[str, ...]]] = []
    for i, row in enumerate(rows):
        if joined and joined[-1][2] == row:
            joined[-1] = (joined[-1][0], i, row)
        else:
            joined.append((i, i, row))
    return [(str(a) if a == b else f"{a}-{b}", *row) for a, b, row in joined]


def heat_map(values: np.ndarray, title: str, unit: str) -> "Figure":
    """A figure of a number for each layer (down) and head (across).

    Args:
      values: [L, H].
      title: above it.
      unit: beside the colours.

    Raises:
      RequestError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise RequestError(
            "plots need matplotlib, which is not installed: pip install 'alaya_jax[plot]'"
        ) from error

    class Picture(Figure):
        """A figure that a notebook shows by itself, whether or not it has loaded pyplot."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    layers, heads = values.shape
    size = (min(3 + 0.35 * heads, 16), min(2 + 0.22 * layers, 14))
    figure = Picture(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set(title=title, xlabel="query head", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label=unit)
    return figure
