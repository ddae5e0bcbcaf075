"""Layouts: how a foreign tensor and a slice of our parameter hold the same numbers.

A layout knows both directions, so that one table serves for loading and for saving.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class Layout(Protocol):
    """The relation between a foreign tensor and the slice of our parameter it fills."""

    def foreign_shape(self, ours: Shape) -> Shape:
        """Shape of the foreign tensor, given the shape of our slice."""

    def to_ours(self, tensor: np.ndarray, ours: Shape) -> np.ndarray:
        """The foreign tensor in our layout."""

    def to_foreign(self, values: np.ndarray) -> np.ndarray:
        """Our slice in the foreign layout."""


@dataclasses.dataclass(frozen=True)
class Same:
    """Both hold the same array: embeddings, norms."""

    def foreign_shape(self, ours: Shape) -> Shape:
        """The shape of our slice."""
        return ours

    def to_ours(self, tensor: np.ndarray, ours: Shape) -> np.ndarray:
        """The tensor itself."""
        return tensor

    def to_foreign(self, values: np.ndarray) -> np.ndarray:
        """The slice itself."""
        return values


@dataclasses.dataclass(frozen=True)
class Folded:
    """A vector there, with heads unfolded here: biases, and scales of queries and keys."""

    def foreign_shape(self, ours: Shape) -> Shape:
        """One axis."""
        return (math.prod(ours),)

    def to_ours(self, tensor: np.ndarray, ours: Shape) -> np.ndarray:
        """The vector, unfolded."""
        return tensor.reshape(ours)

    def to_foreign(self, values: np.ndarray) -> np.ndarray:
        """Our axes folded to one."""
        return values.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Linear:
    """``torch.nn.Linear`` keeps [outputs, inputs]; we keep inputs first, with heads unfolded.

    Attributes:
      input_axes: how many leading axes of our slice are inputs: 1 for [D, H, W], 2 for [H, W, D].
    """

    input_axes: int = 1

    def foreign_shape(self, ours: Shape) -> Shape:
        """[outputs, inputs]."""
        return math.prod(ours[self.input_axes :]), math.prod(ours[: self.input_axes])

    def to_ours(self, tensor: np.ndarray, ours: Shape) -> np.ndarray:
        """[outputs, inputs] transposed and unfolded."""
        return tensor.T.reshape(ours)

    def to_foreign(self, values: np.ndarray) -> np.ndarray:
        """Our axes folded to a matrix and transposed."""
        return values.reshape(self.foreign_shape(values.shape)[::-1]).T


LINEAR = Linear()
"""One input axis, which is what most matrices have."""
