"""Rows of hidden units: what each reads the stream with, in a feed-forward or expert of any kind.

Axis legend: E experts, D model width, F hidden units.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from dynmoe_jax.experts.kinds.kind import ExpertKind, without_experts
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.mesh.axes import axes_of

WHICH = ("auto", "gate", "up")
"""Matrices to choose from; auto is the one whose products the nonlinear function is computed of."""


@dataclasses.dataclass(frozen=True)
class InputMatrix:
    """A matrix that hidden units read the stream with.

    Attributes:
      name: of the array that it is in, without experts.
      part: number of the half, where gate and up stand side by side; None: it is all of it.
    """

    name: str
    part: int | None

    def rows(self, array: np.ndarray) -> Float[np.ndarray, "F D"]:
        """The rows of units in the array of that name."""
        return (array if self.part is None else np.split(array, 2, axis=-1)[self.part]).T


def input_matrix(kind: ExpertKind, which: str) -> InputMatrix:
    """The matrix of a kind of feed-forward that ``--on`` names.

    Raises:
      ConfigError: the kind has none of that name.
    """
    found = {}
    for name in map(without_experts, kind.parameters(1, 1, 1)):
        if axes_of(name) == ["D", "2F"]:
            found |= {"gate": InputMatrix(name, 0), "up": InputMatrix(name, 1)}
        elif axes_of(name) == ["D", "F"]:
            found[name.split("_")[0]] = InputMatrix(name, None)
    if which == "auto":
        which = "gate" if "gate" in found else "up"
    if which not in found:
        raise ConfigError(
            f"--on={which}: {type(kind).__name__} has no such matrix; take --on="
            f"{' or '.join(found) or 'auto'}."
        )
    return found[which]
