"""Interface of the ways to divide the hidden units of a feed-forward, and their registry.

Axis legend: F hidden units, E experts, D model width.
"""

import abc
import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from dynmoe_jax.edits.places import Place
from dynmoe_jax.registry import Registry
from dynmoe_jax.surgery.experts.unit_rows import InputMatrix
from dynmoe_jax.surgery.operation import Given

PARTITIONS = Registry("partition")


@dataclasses.dataclass(frozen=True)
class Units:
    """The hidden units of one dense feed-forward.

    Attributes:
      layer: number of the layer.
      count: F.
      given: parameters of the parent, whatever is being made.
      matrix: of which units have rows.
    """

    layer: int
    count: int
    given: Given
    matrix: InputMatrix

    def rows(self) -> Float[np.ndarray, "F D"]:
        """Vectors that units read the stream with."""
        place = Place(self.layer, f"feed_forward.{self.matrix.name}")
        return self.matrix.rows(self.given.read(place))

    def random(self) -> np.random.Generator:
        """Random numbers of the layer."""
        return self.given.random(Place(self.layer, "feed_forward"), "units")


class Partition(abc.ABC):
    """A way to divide units into experts of one size.

    Derive from it and register it: ``split --by=NAME`` follows.

    Attributes:
      statistics: of a calibration that it needs, by name.
      of_clusters: whether it needs them of as many clusters of text as there are experts.
      makes_up: whether those who split so multiply the output of k of E experts by E / k, as if
        those left out would have given as much as those chosen.
    """

    statistics: ClassVar[frozenset[str]] = frozenset()
    of_clusters: ClassVar[bool] = False
    makes_up: ClassVar[bool] = True

    def check(self) -> None:  # noqa: B027
        """Raises ConfigError where something that it needs is missing."""

    @abc.abstractmethod
    def __call__(self, units: Units, num_experts: int) -> Int[np.ndarray, "F"]:
        """The expert of each unit; all of them get equally many.

        Args:
          units: whose number is a multiple of E.
          num_experts: E.
        """
