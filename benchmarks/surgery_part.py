"""A part of the benchmark of surgery: what it prints, and the marks that it decides."""

import dataclasses

from benchmarks.timing import Mark


@dataclasses.dataclass(frozen=True)
class Part:
    """Findings of a part.

    Attributes:
      lines: to print.
      marks: with their limits.
      figures: whatever else goes into the JSON.
    """

    lines: list[str]
    marks: list[Mark]
    figures: dict
