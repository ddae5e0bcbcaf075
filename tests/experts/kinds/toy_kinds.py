"""Kinds of experts that only tests have: with biases, and one that becomes SwiGLU."""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.experts import ExpertKind, ExpertWeights
from dynmoe_jax.experts.weights import swiglu
from dynmoe_jax.fields import model_setting
from dynmoe_jax.routing import Parameter


@dataclasses.dataclass(frozen=True)
class Biased(ExpertKind):
    """GELU with biases: of the output as well, which devices may not add up."""

    slope: float = model_setting(1.5, "factor of the hidden units", above=0.0)

    def parameters(self, width, num_experts, hidden_width):
        def ones(key, shape):
            return 1 + jax.random.normal(key, shape)

        return {
            "up_EDF": Parameter((num_experts, width, hidden_width)),
            "up_bias_EF": Parameter((num_experts, hidden_width), ones),
            "down_EFD": Parameter((num_experts, hidden_width, width)),
            "down_bias_ED": Parameter((num_experts, width), ones),
        }

    def apply(self, weights, x_RD):
        hidden_RF = jax.nn.gelu(x_RD @ weights["up_EDF"] + weights["up_bias_EF"])
        return self.slope * hidden_RF @ weights["down_EFD"] + weights["down_bias_ED"]

    def flops_per_row(self, width, hidden_width):
        return 4.0 * width * hidden_width


@dataclasses.dataclass(frozen=True)
class Scaled(ExpertKind):
    """SwiGLU whose output projection is stored without its scale."""

    splits_hidden = True

    def parameters(self, width, num_experts, hidden_width):
        return {
            "both_ED2F": Parameter((num_experts, width, 2 * hidden_width)),
            "down_EFD": Parameter((num_experts, hidden_width, width)),
            "down_scale_E": Parameter((num_experts,), "ones", decay=False),
        }

    def dense(self, weights):
        down_EFD = weights["down_EFD"] * weights["down_scale_E"][:, None, None]
        return ExpertWeights(weights["both_ED2F"], down_EFD)

    def apply(self, weights, x_RD):
        y_RD = swiglu(x_RD @ weights["both_ED2F"]) @ weights["down_EFD"]
        return weights["down_scale_E"] * y_RD

    def flops_per_row(self, width, hidden_width):
        return 6.0 * width * hidden_width


@dataclasses.dataclass(frozen=True)
class Normed(ExpertKind):
    """A matrix of the direction of a row: without a derivative, or even a value, at zero."""

    def parameters(self, width, num_experts, hidden_width):
        return {"turn_EDD": Parameter((num_experts, width, width))}

    def apply(self, weights, x_RD):
        unit_RD = x_RD / jnp.sqrt(jnp.sum(jnp.square(x_RD), axis=-1, keepdims=True))
        return unit_RD @ weights["turn_EDD"]

    def flops_per_row(self, width, hidden_width):
        return 2.0 * width * width


TOYS = {"biased": Biased, "scaled": Scaled, "normed": Normed}
