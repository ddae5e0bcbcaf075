"""Controls of a split: what the best experts of each token lose, beside experts of units that were
drawn at random, and of units in the order of their size.

A factor makes up for what is left out as well as one can, so that the choice alone counts.

Axis legend: S sampled tokens, D model width, F hidden units, E experts, U units of one expert.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from dynmoe_jax.experts.kinds.kind import ExpertKind, without_experts
from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.surgery.experts.router_fit import largest

BY_DIVISION = ("these experts", "random units", "units by size")
"""Names of the division that was made, and of its controls."""


@dataclasses.dataclass(frozen=True)
class Division:
    """Hidden units of a feed-forward by expert.

    Attributes:
      experts: units of each.
      shared: units that every token uses.
    """

    experts: Sequence[Int[np.ndarray, "U"]]
    shared: Int[np.ndarray, "U"]

    def in_order(self, order_F: Int[np.ndarray, "F"]) -> "Division":
        """One of the same widths, with units in an order; the shared expert gets the first."""
        ends = np.cumsum([len(units) for units in (self.shared, *self.experts)])
        shared, *experts = np.split(order_F, ends[:-1])
        return Division(experts, shared)


def lost_by_division(
    kind: ExpertKind,
    weights: Mapping[str, np.ndarray],
    input_SD: Float[np.ndarray, "S D"],
    division: Division,
    k: int,
    random: np.random.Generator,
) -> dict[str, float]:
    """Squared errors of the output by who divided the units, as shares of the whole one's square.

    Args:
      kind: of the feed-forward.
      weights: its arrays, by the names of an expert's.
      input_SD: what it reads.
      division: that was made.
      k: experts of a token.
      random: draws the order of the control.
    """
    hidden_SF = np.asarray(kind.hidden(weights, input_SD)[1], np.float32)
    order_F = random.permutation(hidden_SF.shape[1])
    by_size_F = np.argsort(-_size_F(weights), kind="stable")
    divisions = division, division.in_order(order_F), division.in_order(by_size_F)
    return {
        name: _lost(kind, weights, hidden_SF, own, k)
        for name, own in zip(BY_DIVISION, divisions, strict=True)
    }


def _size_F(weights: Mapping[str, np.ndarray]) -> Float[np.ndarray, "F"]:
    """Magnitude of units: the product of the lengths of their rows and columns."""
    lengths = []
    for name, array in weights.items():
        axes = axes_of(without_experts(name))
        halves = 1 + ("2F" in axes)
        if "D" in axes:
            lengths += [
                np.linalg.norm(half, axis=axes.index("D")) for half in np.split(array, halves, -1)
            ]
    return np.prod(lengths, axis=0)


def _lost(kind, weights, hidden_SF, division: Division, k: int) -> float:
    """Share lost with the k experts of each token that have most of its hidden units."""
    member_EF = np.zeros((len(division.experts), hidden_SF.shape[1]), np.float32)
    for own_F, units in zip(member_EF, division.experts, strict=True):
        own_F[units] = 1.0
    chosen_SE = largest(np.abs(hidden_SF) @ member_EF.T, k).astype(np.float32)
    used_SF = chosen_SE @ member_EF
    used_SF[:, division.shared] += 1.0
    whole_SD, part_SD = (
        np.asarray(kind.output(weights, hidden), np.float64)
        for hidden in (hidden_SF, hidden_SF * used_SF)
    )
    # With the factor that comes nearest, the error is what is not along the whole output.
    along, squares = np.vdot(part_SD, whole_SD), np.vdot(part_SD, part_SD)
    return float(1.0 - along**2 / max(squares * np.vdot(whole_SD, whole_SD), 1e-300))
