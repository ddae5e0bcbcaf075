"""Average of models with the same shapes, such as branches of one training."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.edits.arrays import average
from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.fields import ConfigError, free_setting
from dynmoe_jax.surgery.operation import OPERATIONS, Given, Operation


@OPERATIONS.register("average")
@dataclasses.dataclass(frozen=True)
class Average(Operation):
    """Takes the weighted mean of every parameter, and of every moment.

    Equal models give themselves back, bit for bit.
    """

    weights: str = free_setting(
        "",
        "weights of the models in their order, such as 0.7,0.3; empty = equal; divided by "
        "their sum",
    )
    exact: ClassVar = "of equal models"
    paper: ClassVar = "Branch-Train-Merge, 2208.03306; model soups, 2203.05482"
    parents: ClassVar = (2, None)

    def result(self, parents):
        """The settings of the first model."""
        weights_of(self.weights, len(parents))
        check_alike(parents)
        return parents[0]

    def array(self, place, given):
        """The mean of the arrays in this place."""
        return averaged(place, given, weights_of(self.weights, given.num_parents))


def averaged(place: Place, given: Given, weights: Sequence[float]) -> np.ndarray:
    """Mean over parents of the arrays in a place."""
    if given.role is not Role.PARAMETER:
        # Gradients of a weight below 0 are no smaller, and means of squares no less than 0.
        total = sum(map(abs, weights))
        weights = [abs(weight) / total for weight in weights]
    return average([given.read(place, i) for i in range(given.num_parents)], weights)


def weights_of(text: str, count: int) -> list[float]:
    """Weights of so many models, which sum to 1.

    Raises:
      ConfigError: ``--weights`` is not a list of so many numbers with a positive sum.
    """
    if not text:
        return [1 / count] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not sum(weights) > 0 or not np.all(np.isfinite(weights)):
        raise ConfigError(
            f"--weights={text} must be {count} numbers with commas between them, one for each "
            "--from, whose sum is positive."
        )
    return [weight / sum(weights) for weight in weights]


def check_alike(parents: Sequence[config.Config]) -> None:
    """Raises ConfigError unless all parents compute the same function of their parameters."""
    first = _defining(parents[0])
    for number, other in enumerate(parents[1:], start=2):
        for path, value in _defining(other).items():
            if first.get(path) != value:
                raise ConfigError(
                    f"--from number {number} has config.{path}={value!r}, and the first one "
                    f"{first.get(path)!r}; give models of one shape."
                )


def _defining(cfg: config.Config) -> dict[str, object]:
    return {
        path: value
        for path, field, value in config.walk(cfg)
        if field.metadata["defines_model"] and path != "model.max_seq_len"
    }
