"""Language model: mean cross entropy of the next token.

Axis legend: B batch, L positions, D model width.
"""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.model.kernels.cross_entropy.chunked import cross_entropy_sums
from dynmoe_jax.registry import OBJECTIVES
from dynmoe_jax.training.objectives.objective import Objective


@OBJECTIVES.register("language_model")
@dataclasses.dataclass(frozen=True)
class LanguageModel(Objective):
    """Mean cross entropy of every token but padding, with the output z-loss in it.

    A kind that weighs tokens otherwise only says so by ``loss_weights``.
    """

    def sums(self, decoder, x_BLD, batch, loss):
        """Cross entropies and likelihoods, weighed by position, and the weights."""
        weight_BL = self.loss_weights(batch)
        cross_entropy, nll_BL = cross_entropy_sums(
            x_BLD,
            decoder.output_DV,
            batch["targets"],
            weight_BL,
            z_weight=loss.z_weight,
            chunk_tokens=loss.chunk_tokens,
            plain=decoder.config.plain,
        )
        return {
            "cross_entropy": cross_entropy,
            "nll": jnp.sum(weight_BL * nll_BL),
            "weight": jnp.sum(weight_BL, dtype=jnp.float32),
        }

    def value(self, sums):
        """The weighed mean, and ``lm_loss``, which has no z-loss in it."""
        divisor = jnp.where(sums["weight"] > 0, sums["weight"], 1)
        return sums["cross_entropy"] / divisor, {"lm_loss": sums["nll"] / divisor}
