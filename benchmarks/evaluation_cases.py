"""What `benchmarks.evaluation` asks of both models: the same tasks, items and tokens."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Asked:
    """One comparison.

    Attributes:
      model: a folder in Hugging Face's format, or a GGUF file.
      data_dir: folder with the tasks' items.
      tasks: their names.
      limit: items of each at the most.
      threads: cores.
      max_new_tokens: tokens written at the most.
      max_length: tokens read at once.
      softmax: type of ``hf``'s log-probabilities.
    """

    model: str
    data_dir: str
    tasks: tuple[str, ...]
    limit: int
    threads: int
    max_new_tokens: int
    max_length: int = 2048
    softmax: str = "float32"


def tasks_of(asked: Asked) -> dict[str, list]:
    """The harness's tasks on local items."""
    from dynmoe_jax.evaluation.harness.local_tasks import load_tasks

    return load_tasks(list(asked.tasks), Path(asked.data_dir))


class Case:
    """One task with one model; a case for timing.

    Args:
      make_model: a model of the harness that remembers no answer.
      parts: the task.
      limit: items at the most.

    Attributes:
      found: what the harness returned last.
    """

    def __init__(self, make_model: Callable[[], Any], parts: list, limit: int):
        self.make_model, self.parts, self.limit = make_model, parts, limit
        self.found: dict[str, Any] = {}

    def __call__(self) -> float:
        """Seconds in the model's own methods: making prompts and counting points is not timed."""
        from lm_eval.evaluator import simple_evaluate

        from dynmoe_jax.evaluation.harness.quiet import quiet_harness

        model, clock = self.make_model(), _Clock()
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(model, name, clock.around(getattr(model, name)))
        with quiet_harness():
            self.found = simple_evaluate(
                model, tasks=list(self.parts), limit=self.limit, bootstrap_iters=0
            )
        return clock.seconds


class _Clock:
    def __init__(self):
        self.seconds = 0.0

    def around(self, method: Callable) -> Callable:
        def call(*arguments, **more):
            begin = time.perf_counter()
            found = method(*arguments, **more)
            self.seconds += time.perf_counter() - begin
            return found

        return call


def answers(found: Mapping[str, Any]) -> dict[str, list]:
    """What a model answered, in the order of items: [log p, greedy] or a text, by task."""
    return {
        task: [
            response if isinstance(response, str) else [float(response[0]), bool(response[1])]
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
            for responses in sample["resps"]
            for response in responses
        ]
        for task, samples in found["samples"].items()
    }


def points(found: Mapping[str, Any]) -> dict[str, float]:
    """What each task is judged by, of what the harness returned."""
    return {
        task: next(
            value
            for name, value in found["results"][task].items()
            if name.split(",")[0] in ("acc", "exact_match")
        )
        for task in found["samples"]
    }
