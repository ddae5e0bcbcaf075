"""Figures that the paper of Top-P routing reports (Harder Tasks Need More Experts, arXiv
2403.07652)."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class PaperTask:
    """One row of the paper's two tables.

    Attributes:
      name: as the paper writes it.
      accuracy: percent, by model.
      experts: mean experts per token of the Top-P model.
    """

    name: str
    accuracy: Mapping[str, float]
    experts: float


MODELS = ("dense 374M", "dense 570M", "top-1", "top-2", "top-p")


def _row(name: str, accuracy: tuple[float, ...], experts: float) -> PaperTask:
    return PaperTask(name, dict(zip(MODELS, accuracy, strict=True)), experts)


TASKS = {
    "piqa": _row("PIQA", (64.3, 65.9, 67.3, 68.1, 68.1), 1.72),
    "hellaswag": _row("HellaSwag", (36.1, 39.6, 42.3, 43.9, 44.3), 1.76),
    "arc_easy": _row("ARC-e", (37.9, 37.6, 39.5, 40.4, 39.9), 1.73),
    "commonsense_qa": _row("CommonsenseQA", (32.2, 31.7, 30.3, 32.1, 33.6), 1.74),
    "bbh": _row("BBH", (22.3, 22.1, 23.0, 23.3, 25.6), 1.87),
}
"""By task, as ``--tasks`` names it.  The paper does not say how it scored them."""

MEAN = _row("Mean", (38.6, 39.4, 40.5, 41.6, 42.3), 1.76)
