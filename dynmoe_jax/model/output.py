"""The results of a decoder: logits, and the routing of its MoE layers.

Axis legend: B batch, L positions, T = B L tokens, V vocabulary, N MoE layers, E experts, K slots
per token.
"""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRouting:
    """The routing of N MoE layers, as losses and reports read it.

    Attributes:
      by_layer: a Routing whose arrays are stacked: [N, T, K] and [N, T, E].
      valid_BL: False for padding.
      rows_dropped_N: rows that a budget or a capacity left out.
    """

    by_layer: Routing
    valid_BL: Bool[Array, "B L"]
    rows_dropped_N: Int[Array, "N"]

    @property
    def valid_T(self) -> Bool[Array, "T"]:
        """valid_BL, flattened like the tokens of ``by_layer``."""
        return self.valid_BL.reshape(-1)

    @property
    def experts_per_token(self) -> Int[Array, "N B L"]:
        """Experts that each token used in each MoE layer."""
        return self.by_layer.experts_per_token_T.reshape(-1, *self.valid_BL.shape)

    @property
    def probs(self) -> Float[Array, "N B L E"]:
        """Router probabilities."""
        return self.by_layer.probs_TE.reshape(-1, *self.valid_BL.shape, self.by_layer.num_experts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """The results of a decoder.

    Attributes:
      logits: [B, L, V], float32.
      routing: of the MoE layers; None in a dense model.
    """

    logits: Float[Array, "B L V"]
    routing: LayerRouting | None
