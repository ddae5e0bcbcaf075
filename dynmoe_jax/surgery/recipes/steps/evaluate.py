"""Step of a recipe: an evaluation of the model of another step."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.surgery.recipes.step import (
    STEPS,
    Place,
    Price,
    Result,
    Step,
    files_of,
    model_of,
)
from dynmoe_jax.surgery.storage.target import written_whole

INSTRUCTIONS = "instructions.json"
"""File with the scores of responses."""

SECONDS = 60.0
"""Seconds of an evaluation, whose text is as long as nobody knows before it is read."""


_GIVEN = ("--workdir", "--output")
"""Flags that the recipe gives."""


@STEPS.register("evaluate")
@dataclasses.dataclass(frozen=True)
class Evaluate(Step):
    """An evaluation.

    Attributes:
      of: the step whose model is evaluated.
      arguments: of ``python -m dynmoe_jax.evaluation``, but for ``--workdir`` and ``--output``.
    """

    of: Step
    arguments: tuple[str, ...]

    @property
    def needs(self) -> tuple[Step, ...]:
        """The step whose model is evaluated."""
        return (self.of,)

    def facts(self) -> Mapping[str, Any]:
        """The arguments, and which files they name."""
        from dynmoe_jax.evaluation.__main__ import parsed

        asked = parsed([*self.arguments, "--workdir=."])
        named = filter(None, (asked.perplexity, asked.instructions))
        files = [each for sources in named for each in files_of(sources)]
        return {"arguments": list(self.arguments), **({"files": files} if files else {})}

    def price(self) -> Price:
        """A minute; that there is a model, and that the arguments can be read."""
        from dynmoe_jax.evaluation.__main__ import parsed

        for argument in self.arguments:
            if argument.partition("=")[0] in _GIVEN:
                raise config.ConfigError(f"{argument} has no effect in a recipe; leave it out.")
        model_of(self.of, self.name)
        parsed([*self.arguments, "--workdir=."])
        return Price(seconds=SECONDS)

    def message(self, place: Place, text: Path) -> Mapping[str, Any]:
        """The command line."""
        return {"arguments": [*self.arguments, f"--workdir={place(self.of)}"]}

    @staticmethod
    def do(job: Mapping[str, Any], folder: Path) -> int:
        """Evaluates into a folder that is there when all of it is."""
        from dynmoe_jax.evaluation.__main__ import evaluate, parsed

        with written_whole(folder) as unfinished:
            return evaluate(parsed([*job["arguments"], f"--output={unfinished}"]))

    def result(self, folder: Path) -> Result:
        """Files that it wrote, and scores of responses."""
        pages = sorted(folder.glob("*.html"))
        files = ", ".join(sorted(path.name for path in folder.iterdir()))
        page = pages[0].name if pages else ""
        if not (folder / INSTRUCTIONS).exists():
            return Result(page=page, note=files)
        found = json.loads((folder / INSTRUCTIONS).read_text(encoding="utf-8"))
        scores = {"all": found["all"], **found["tasks"]}
        exact = {name: score["exact"] for name, score in scores.items()}
        return Result(exact=exact, page=page, note=f"{100 * exact['all']:.1f} % exact")
