"""Number of experts that tokens use: by task, by layer, by token.

Every token counts that a model reads when each request of a task is put to it alone: context and
continuation without its last token, which is only predicted; of a text that is written, the prompt
and what was written but for its last token.  A context that four endings share counts four times,
although it is computed once.  Padding counts nowhere.

Axis legend: N MoE layers, L tokens of a text, V vocabulary.
"""

import dataclasses
from collections import defaultdict

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Example:
    """A text and the experts that its tokens used, summed over the MoE layers."""

    tokens: tuple[int, ...]
    experts_L: Int[np.ndarray, "L"]


@dataclasses.dataclass
class TaskUse:
    """Use of experts by the tokens of one task.

    Attributes:
      tokens: that counted.
      experts_N: experts used in each layer, summed over the tokens.
      example: the first text.
    """

    tokens: int = 0
    experts_N: Int[np.ndarray, "N"] | None = None
    example: Example | None = None

    @property
    def by_layer(self) -> list[float]:
        """Mean experts per token of each MoE layer; empty in a dense model."""
        return [] if self.experts_N is None else (self.experts_N / max(1, self.tokens)).tolist()

    @property
    def mean(self) -> float:
        """Mean experts per token and MoE layer; NaN in a dense model."""
        return float(np.mean(self.by_layer)) if self.by_layer else float("nan")


class ExpertUse:
    """Counts of all tasks.

    Args:
      vocab_size: V.
    """

    def __init__(self, vocab_size: int):
        self.tasks: dict[str, TaskUse] = defaultdict(TaskUse)
        self.layers = 0
        self.experts_V = np.zeros(vocab_size, np.int64)
        """Experts that each token of the vocabulary used, summed over layers and occurrences."""
        self.count_V = np.zeros(vocab_size, np.int64)

    def add(
        self,
        task: str,
        read: tuple[int, ...],
        experts_N: Int[np.ndarray, "N"],
        experts_L: Int[np.ndarray, "L"],
    ) -> None:
        """Counts one request.

        Args:
          task: the task's name.
          read: the tokens that count.
          experts_N: experts used in each layer, summed over the tokens.
          experts_L: experts that each token used, summed over the layers.
        """
        if not len(experts_N):
            return
        use, self.layers = self.tasks[task], len(experts_N)
        use.tokens += len(read)
        use.experts_N = experts_N if use.experts_N is None else use.experts_N + experts_N
        use.example = use.example or Example(tuple(read), experts_L)
        np.add.at(self.experts_V, list(read), experts_L)
        np.add.at(self.count_V, list(read), 1)

    def together(self, tasks: list[str]) -> TaskUse:
        """Several tasks as one, over all their tokens."""
        whole = TaskUse()
        for use in (self.tasks[task] for task in tasks if task in self.tasks):
            whole.tokens += use.tokens
            whole.experts_N = use.experts_N + (0 if whole.experts_N is None else whole.experts_N)
            whole.example = whole.example or use.example
        return whole

    def by_token(self, least: int) -> list[tuple[int, float, int]]:
        """(token, mean experts per layer, occurrences), from most to fewest experts.

        Args:
          least: occurrences that a token must have.
        """
        often = np.flatnonzero(self.count_V >= max(1, least))
        mean = self.experts_V[often] / self.count_V[often] / max(1, self.layers)
        return [
            (int(often[i]), float(mean[i]), int(self.count_V[often[i]])) for i in np.argsort(-mean)
        ]
