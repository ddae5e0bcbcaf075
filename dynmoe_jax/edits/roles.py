"""Rules for an optimizer's moments when parameters are edited.

Whatever copies entries (take, concatenate, average) is done to moments as to parameters.  Where a
parameter is multiplied, the gradient of the new one is that of the old one divided, and where it is
drawn, it has no history.
"""

import enum

import numpy as np


class Role(enum.Enum):
    """The part of a model's state that an array belongs to: parameters, or Adam's moments."""

    PARAMETER = "params"
    FIRST = "first"
    SECOND = "second"


def rescale(array: np.ndarray, factor: float, role: Role) -> np.ndarray:
    """The array of a parameter that is multiplied by a factor.

    A function of ``factor * w`` has the gradient of w divided by the factor, so the mean of
    gradients is divided by it, and that of their squares by its square.
    """
    if factor == 1.0:
        return array
    power = {Role.PARAMETER: 1, Role.FIRST: -1, Role.SECOND: -2}[role]
    return (array * np.float64(factor) ** power).astype(array.dtype)


def drawn(values: np.ndarray, role: Role) -> np.ndarray:
    """The array of a parameter that is drawn anew: moments are zero."""
    return values if role is Role.PARAMETER else np.zeros_like(values)


def redrawn(array: np.ndarray, values: np.ndarray, chosen: np.ndarray, role: Role) -> np.ndarray:
    """The array of a parameter of which chosen entries are drawn anew."""
    return np.where(chosen, drawn(values, role), array)


def disturbed(array: np.ndarray, noise: np.ndarray, role: Role) -> np.ndarray:
    """The array of a parameter with noise: moments stay what they were."""
    return array + noise if role is Role.PARAMETER else array
