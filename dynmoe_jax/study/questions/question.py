"""Interface of a question, and the sentences in which its answers are told."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from dynmoe_jax.evaluation.report.theme import Canvas, Picture
from dynmoe_jax.runs.formatting import decimals
from dynmoe_jax.study.questions.results import Results
from dynmoe_jax.study.statistics import UNDECIDED, Estimate, verdict

SILENT = "The paper does not say."
ONE_SEED = " One seed says nothing of what another one would give."


@dataclasses.dataclass(frozen=True)
class Answer:
    """Answer to one thing that is asked.

    Attributes:
      name: short, for who reads ``study.json`` by program.
      question: in words.
      estimate: with its interval.
      unit: of the estimate.
      sentence: made of the numbers.
      paper: what the paper reports.
      agrees_with_paper: ``yes``, ``no`` or ``undecided``.
    """

    name: str
    question: str
    estimate: Estimate
    unit: str
    sentence: str
    paper: str = SILENT
    agrees_with_paper: str = UNDECIDED

    def record(self, number: int) -> dict[str, Any]:
        """For JSON."""
        found = self.estimate
        return {
            "number": number,
            "name": self.name,
            "question": self.question,
            "estimate": found.value,
            "interval": list(found.interval),
            "unit": self.unit,
            "seeds": found.seeds,
            "half_width_of_seeds": found.seed_half,
            "half_width_within_runs": found.within_half,
            "sentence": self.sentence,
            "paper": self.paper,
            "agrees_with_paper": self.agrees_with_paper,
        }


@dataclasses.dataclass(frozen=True)
class Table:
    """Table of the page: the first column is text, the others are numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


class Question(abc.ABC):
    """One question of the study.

    Attributes:
      title: the question.
      models: names of those that it compares, ablations aside.
      note: what has to be known besides to read its answers.
      measures: names of the measures that it reads.
    """

    title: ClassVar[str]
    models: ClassVar[tuple[str, ...]]
    note: ClassVar[str] = ""
    measures: ClassVar[tuple[str, ...]] = ("heldout",)

    @abc.abstractmethod
    def answers(self, results: Results) -> list[Answer]:
        """Answers, as far as there are results to answer from."""

    def tables(self, results: Results) -> list[Table]:
        """Tables below them."""
        del results
        return []

    def data(self, results: Results) -> dict[str, Any]:
        """Figures that :meth:`pictures` draws."""
        del results
        return {}

    def pictures(self, data: dict[str, Any], canvas: Canvas) -> list[Picture | None]:
        """Pictures of the figures."""
        del data, canvas
        return []


def in_words(found: Estimate, digits: int = 3) -> str:
    """``0.012 (-0.003 to 0.027)``."""
    value, low, high = (decimals(x, digits) for x in (found.value, *found.interval))
    return f"{value} ({low} to {high})"


def compared(found: Estimate, above: str, below: str, digits: int = 3) -> str:
    """A sentence about a difference that has a sign where its interval has one.

    Args:
      found: the difference.
      above: words where it is certainly above 0, with ``{}`` for its size.
      below: the same where it is below; the size is without sign.
      digits: decimals.
    """
    if not all(map(math.isfinite, found.interval)):
        return f"Nothing is certain: {in_words(found, digits)}."
    if found.low > 0:
        return above.format(in_words(found, digits)) + "."
    if found.high < 0:
        turned = Estimate(-found.value, -found.high, -found.low, found.seeds)
        return below.format(in_words(turned, digits)) + "."
    return f"No difference is certain: {in_words(found, digits)}."


def claimed(
    name: str,
    question: str,
    found: Estimate,
    unit: str,
    words: tuple[str, str],
    paper: str,
    *,
    least: float = 0.0,
    of_training: bool = True,
    reason: str = "",
    digits: int = 3,
) -> Answer:
    """Answer to whether a difference is above 0, as the paper says.

    Args:
      name: as in :class:`Answer`.
      question: as there.
      found: the difference, turned so that the paper says it is positive.
      unit: as there.
      words: what is said where it is above 0, and below; see :func:`compared`.
      paper: what the paper reports.
      least: as of :func:`~dynmoe_jax.study.statistics.verdict`.
      of_training: as there.
      reason: likely cause where it is not as in the paper.
      digits: decimals.
    """
    agrees = verdict(found, least=least, of_training=of_training)
    sentence = compared(found, *words, digits=digits)
    if least and agrees == "no" and found.high >= 0:
        sentence = f"No, or hardly: {in_words(found, digits)}."
    if found.seeds == 1 and of_training:
        sentence += ONE_SEED
    if agrees == "no" and reason:
        sentence += f" {reason}"
    return Answer(name, question, found, unit, sentence, paper, agrees)


def silent(
    name: str,
    question: str,
    found: Estimate,
    unit: str,
    words: tuple[str, str],
    *,
    of_training: bool = True,
    digits: int = 3,
) -> Answer:
    """Answer to something that the paper does not say; arguments as of :func:`claimed`."""
    sentence = compared(found, *words, digits=digits)
    if found.seeds == 1 and of_training:
        sentence += ONE_SEED
    return Answer(name, question, found, unit, sentence)
