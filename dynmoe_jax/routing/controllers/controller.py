"""Interface of controllers, which set the coefficient of a loss, and their registry.

Axis legend: N MoE layers, E experts.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCounts:
    """Counts over the valid tokens of a batch, by MoE layer; they add up.

    Attributes:
      load_NE: tokens that chose each expert; 0 where a layer has fewer experts than the largest.
      exists_NE: whether a layer has so many experts.
      dropped_N: (token, expert) pairs that were chosen and then dropped.
      expected_N: experts per token that the layer's router aims at.
      tokens: valid tokens.
    """

    load_NE: Int[Array, "N E"]
    exists_NE: Bool[Array, "N E"]
    dropped_N: Int[Array, "N"]
    expected_N: Float[Array, "N"]
    tokens: Float[Array, ""]


class Controller(abc.ABC):
    """A rule for the coefficient of a loss: a frozen dataclass whose fields are its settings.

    Its state lies in the checkpoint; a skipped update leaves it as it was.  A schedule is a
    controller without state.

    Attributes:
      per_layer: whether each layer has a coefficient of its own.
    """

    per_layer: ClassVar[bool] = False

    def initial(self, weight: float, layers: int) -> dict[str, Array]:
        """State before the first step.

        Args:
          weight: the coefficient that the settings name.
          layers: N.
        """
        return {}

    @abc.abstractmethod
    def coefficient(
        self, weight: float, state: dict[str, Array], step: Int[Array, ""]
    ) -> Float[Array, "*N"]:
        """The coefficient of this step: one, or one for each layer."""

    def update(self, state: dict[str, Array], counts: LayerCounts) -> dict[str, Array]:
        """The state after an applied update, of the counts of the whole batch."""
        return state


def share_dropped(counts: LayerCounts) -> Float[Array, "N"]:
    """Share of the chosen (token, expert) pairs of each layer that was dropped."""
    chosen_N = jnp.sum(counts.load_NE, axis=-1)
    return counts.dropped_N / jnp.maximum(chosen_N, 1)


def state_of(**arrays: Any) -> dict[str, Array]:
    """Float32 arrays by name."""
    return {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}
