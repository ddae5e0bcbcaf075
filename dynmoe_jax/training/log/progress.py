"""Progress that a person sees while the model trains: a live bar, or a line per logged step in a
log."""

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from dynmoe_jax.console import console
from dynmoe_jax.runs.formatting import clock, compact, decimals


class TrainingProgress:
    """Shows step, loss, mean experts per token, speed and time left.

    On a terminal this is one bar that is redrawn in place; anywhere else (a file, CI, a notebook)
    a line is printed at every step that brings metrics.

    Args:
      first_step: steps that were done before, 0 in a new run.
      total_steps: steps when training is complete.
    """

    def __init__(self, first_step: int, total_steps: int):
        self._total = total_steps
        self._live = console.is_terminal
        self._pace = _Pace(total_steps)
        self._figures = "waiting for the first step …"
        self._bar = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=console,
            refresh_per_second=4,
            expand=True,
            disable=not self._live,
        )
        self._step = first_step
        self._task = self._bar.add_task(
            "", total=total_steps, completed=first_step, figures=self._figures
        )

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Says that ``step`` is done; ``metrics``, if it was logged, may be of an earlier step."""
        self._step = max(self._step, step)
        self._pace.reached(self._step)
        left = clock(self._pace.seconds_left())
        if self._live:
            if metrics is not None:
                self._figures = "  ".join(_figures(metrics, brief=True))
            shown = f"{self._figures}  {left} left"
            self._bar.update(self._task, completed=self._step, figures=shown)
        elif metrics is not None:
            width = len(f"{self._total:,}")
            parts = [f"step {step:>{width},}/{self._total:,}", *_figures(metrics, brief=False)]
            console.print("  ".join(parts) + f"  {left:>7} left", soft_wrap=True)


class _Pace:
    """Seconds left at the mean speed so far, not counting the first step, which warms up."""

    def __init__(self, total_steps: int):
        self._total = total_steps
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def reached(self, step: int) -> None:
        """Notes when a step was done."""
        self._last = (step, time.perf_counter())
        self._first = self._first or self._last

    def seconds_left(self) -> float:
        """At the mean speed since the first step that was noted."""
        (first, started), (last, now) = self._first, self._last
        if last >= self._total:
            return 0.0
        return (now - started) / (last - first) * (self._total - last) if last > first else math.nan


def _figures(metrics: Mapping[str, Any], brief: bool) -> list[str]:
    """Loss, experts per token and speed: of constant width, or as brief as a bar needs them."""
    loss, experts, speed = (
        metrics.get(name, math.nan) for name in ("loss", "experts_per_token", "tokens_per_second")
    )
    moe = math.isfinite(experts) and experts > 0  # a dense model has none
    if brief:
        figures = [f"loss {decimals(loss, 3)}"] + [f"experts {decimals(experts, 2)}"] * moe
        return [*figures, f"{compact(speed)} tokens/s"]
    figures = [f"loss {decimals(loss, 4):>7}"] + [f"experts/token {experts:5.2f}"] * moe
    return [*figures, f"{decimals(speed, 0):>9} tokens/s"]
