"""Terminal output: one console, and progress bars on it."""

import contextlib
import time
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# In a notebook too, lines of plain text: rich would make an HTML block of every line, and told not
# to, take the kernel for a terminal, because that sets FORCE_COLOR.
console = Console(
    highlight=False,
    force_jupyter=False,
    force_terminal=False if Console().is_jupyter else None,
)


def warn(sentence: str) -> None:
    """Shows what a person should know of although the program goes on."""
    console.print(f"[bold yellow]warning:[/] {escape(sentence)}", soft_wrap=True)


def titled_table(title: str) -> Table:
    """A table as all of this project's are, without columns yet."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="cyan",
    )


@contextlib.contextmanager
def stage(title: str, total: float | None = None, unit: str = "") -> Iterator["Stage"]:
    """Shows one stage of long work: a bar on a terminal, a first and a last line elsewhere.

    Args:
      title: what is being done, e.g. ``"Reading the Python installation"``.
      total: how much there is to do, if known.
      unit: what is counted, e.g. ``"documents"``.

    Yields:
      a :class:`Stage`; call its ``advance`` as work gets done.
    """
    hidden = not console.is_terminal
    if hidden:
        console.print(f"{title} …", markup=False)
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}")]
    columns += [TimeElapsedColumn(), TimeRemainingColumn()]
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        shown = Stage(progress, progress.add_task(title, total=total, count=""), unit)
        yield shown
    seconds = time.perf_counter() - started
    count = f"{shown.done:,.0f} {unit} in " if unit else ""
    console.print(f"{title}: {count}{seconds:.1f} s", markup=False)


class Stage:
    """Progress of one stage."""

    def __init__(self, progress: Progress, task, unit: str):
        self._progress, self._task, self._unit = progress, task, unit
        self.done = 0.0

    def advance(self, amount: float = 1) -> None:
        """Counts ``amount`` more units as done."""
        self.done += amount
        count = f"{self.done:,.0f} {self._unit}"
        self._progress.update(self._task, advance=amount, count=count)
