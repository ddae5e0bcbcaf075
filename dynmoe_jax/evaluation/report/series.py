"""The lines of ``metrics.jsonl`` as arrays that can be drawn.

Axis letters: S logged steps (or bins of them), N MoE layers.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

# More points than a figure has room for only make the page heavy.
_MAX_POINTS = 400


@dataclasses.dataclass(frozen=True)
class History:
    """The metrics of a run over its steps; NaN where a number is missing or not finite."""

    metrics: Sequence[dict[str, Any]]

    @property
    def steps(self) -> np.ndarray:
        """[S] the logged steps."""
        return np.array([line["step"] for line in self.metrics], dtype=float)

    def scalar(self, name: str) -> np.ndarray:
        """[S] a metric that is one number per step."""
        values = np.array([line.get(name, np.nan) for line in self.metrics], dtype=float)
        return np.where(np.isfinite(values), values, np.nan)

    def layers(self, name: str) -> np.ndarray:
        """[S, N] a metric with one number per layer; N is 0 where no line has it."""
        rows = [line.get(name) or [] for line in self.metrics]
        width = max(map(len, rows), default=0)
        table = np.full((len(rows), width), np.nan)
        for row, values in zip(table, rows, strict=True):
            row[: len(values)] = values
        return np.where(np.isfinite(table), table, np.nan)

    def by_layer(self, prefix: str) -> list[str]:
        """Metrics that begin so and have a number for each layer, in the order of the lines."""
        ending = "_by_layer"
        names = dict.fromkeys(name for line in self.metrics for name in line)
        return [
            name.removesuffix(ending)
            for name in names
            if name.startswith(prefix) and name.endswith(ending)
        ]

    def named(self, prefix: str) -> list[str]:
        """Metrics whose names begin so, in the order of the lines."""
        return list(
            dict.fromkeys(name for line in self.metrics for name in line if name.startswith(prefix))
        )

    def has(self, name: str) -> bool:
        """Whether there is anything to draw: a finite number other than zero."""
        return bool(np.any(np.nan_to_num(self.scalar(name))))


def thin(values: np.ndarray, reduce: str = "mean") -> np.ndarray:
    """``values`` [S, ...] in at most a few hundred bins of neighbours, reduced ignoring NaN."""
    size = -(-len(values) // _MAX_POINTS) if len(values) else 1
    if size == 1:
        return values
    bins = np.split(values, range(size, len(values), size))
    function = {"mean": np.nanmean, "min": np.nanmin, "max": np.nanmax}[reduce]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a bin of nothing but NaN is NaN
        return np.stack([function(part, axis=0) for part in bins])


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Mean over ``span`` neighbours on each side, fewer towards the ends, stepping over NaN.

    The window is symmetric everywhere, so that the trend neither lags nor bends at the ends.
    """
    known = np.isfinite(values)
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, values, 0.0), known)
    )
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, len(values) - 1 - index), span)
    low, high = index - reach, index + reach + 1
    number = counts[high] - counts[low]
    return np.where(known, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)
