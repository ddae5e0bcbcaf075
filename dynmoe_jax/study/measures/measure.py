"""Interface of a measure."""

import abc
from pathlib import Path
from typing import Any, ClassVar

from dynmoe_jax.study.measures.trained import TrainedRun


class Measure(abc.ABC):
    """Measures trained runs of some models.

    Attributes:
      analyzes: whether it reads the analysis of a run's routing.
    """

    analyzes: ClassVar[bool] = False

    @abc.abstractmethod
    def is_of(self, model: str) -> bool:
        """Whether runs of a model are measured."""

    @abc.abstractmethod
    def take(self, run: TrainedRun, items: Path | None) -> dict[str, Any]:
        """The record of a run, for JSON.

        Args:
          run: the run.
          items: folder of evaluation items, if there is one.
        """

    def passes(self, model: str) -> int:
        """Passes over held-out text that it takes of a run of a model, about."""
        del model
        return 1

    def depends_on(self, items: Path | None) -> dict[str, Any]:
        """Facts with which a record goes out of date."""
        del items
        return {}
