"""Progress bars on stderr, for whatever may take more than two seconds. Silent off a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal


@contextmanager
def progress_bar(
    title: str,
    total: int,
    unit: Literal["tokens", "bytes", "steps", "requests"] = "tokens",
    *,
    show: bool = True,
) -> Iterator[Callable[[int], None]]:
    """Yields a function that adds to a bar with amount, rate and time left."""
    import jax
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if unit == "bytes":
        amount = (progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn())
    else:
        rate = progress.TextColumn(f"{unit}, {{task.fields[rate]}}")
        amount = (progress.MofNCompleteColumn(), rate)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *amount,
        progress.TimeRemainingColumn(),
    )
    visible = show and jax.process_index() == 0 and (console.is_terminal or console.is_jupyter)
    with progress.Progress(*columns, console=console, disable=not visible, transient=True) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(count: int) -> None:
            bar.advance(task, count)
            bar.update(task, rate=f"{bar.tasks[task].speed or 0:,.0f}/s")

        yield advance
