"""Edits of one array, by the letters of its axes.

Arrays are those of one layer, named as parameters are (``down_FD``; one expert of ``down_EFD`` is
``down_FD`` too).  ``2F``, gate and up side by side, counts as the axis F in both halves.

Axis legend: E experts, F hidden width, D model width.
"""

from collections.abc import Sequence

import numpy as np

from dynmoe_jax.mesh.axes import axes_of


def has_axis(name: str, letter: str) -> bool:
    """Whether an array with that name has an axis, twice side by side or not."""
    return letter in _letters(name)


def size_of(array: np.ndarray, name: str, letter: str) -> int:
    """Length of an axis; of one half, where it is there twice."""
    axis, halves = _axis(name, letter)
    return array.shape[axis] // halves


def take(array: np.ndarray, name: str, letter: str, indices: Sequence[int]) -> np.ndarray:
    """The entries of an axis that indices name, in their order; as often as they name them.

    A permutation, a slice and a replication are all of this kind.  Without the axis, the array
    itself.
    """
    if not has_axis(name, letter):
        return array
    axis, halves = _axis(name, letter)
    length = array.shape[axis] // halves
    index = np.concatenate([np.asarray(indices) + half * length for half in range(halves)])
    return array.__array_namespace__().take(array, index, axis=axis)


def concatenate(arrays: Sequence[np.ndarray], name: str, letter: str) -> np.ndarray:
    """Arrays put together along an axis; each half by itself, where it is there twice."""
    axis, halves = _axis(name, letter)
    parts = [np.split(array, halves, axis) for array in arrays]
    return np.concatenate([part[half] for half in range(halves) for part in parts], axis)


def average(arrays: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Weighted sum of arrays, computed in float64; the same array throughout is given back bit for
    bit where the weights sum to 1."""
    first, *others = arrays
    total = np.zeros(first.shape, np.float64)
    # Differences to the first: of equal arrays they are 0, whatever the weights round to.
    for array, weight in zip(others, weights[1:], strict=True):
        total += weight * (array.astype(np.float64) - first)
    return (total + float(np.round(sum(weights), 12)) * first).astype(first.dtype)


def _letters(name: str) -> list[str]:
    return [axis.lstrip("2") for axis in axes_of(name)]


def _axis(name: str, letter: str) -> tuple[int, int]:
    """(the axis counted from the end, how often it is there side by side)."""
    axes = axes_of(name)
    place = _letters(name).index(letter)
    return place - len(axes), 2 if axes[place].startswith("2") else 1
