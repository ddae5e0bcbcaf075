"""BlockFFN: a ReLU router whose gates are normalized, for many narrow experts (arXiv 2507.08771).

The number of experts of a token is free, as with ReMoE; two losses of their own make neighbors, and
chunks of tokens, use the same experts (:mod:`dynmoe_jax.routing.losses.activation_locality`,
:mod:`dynmoe_jax.routing.losses.chunk_sparsity`).

Axis legend: T tokens, E experts.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import fill_slots, masked_logits
from dynmoe_jax.routing.router import Parameter
from dynmoe_jax.routing.routers.relu import ReLU

EPSILON = 1e-6
"""Added to the mean square of the gates."""


@ROUTERS.register("block_ffn")
@dataclasses.dataclass(frozen=True)
class BlockFFN(ReLU):
    """Every expert with a positive logit is used, weighed by RMSNorm of ReLU (equation 2).

    ``probs_TE`` are the gates before the norm: losses read how much of a token an expert has.
    """

    experts_per_token: float = model_setting(
        2.0, "mean experts per token that memory and plans reckon with", unit="experts", above=0.0
    )
    # Project choice: the paper's coefficients follow a schedule, and none is a default.
    losses: ClassVar = {"activation_locality": 1e-3, "chunk_sparsity": 1e-2}

    def describe(self) -> str:
        """Names the rule."""
        return "ReLU with normalized gates"

    def advice(self, wish: str) -> str:
        """Names the coefficients of both losses."""
        if wish == "balance":
            return "lower config.loss.chunk_sparsity.weight"
        return f"{'raise' if wish == 'fewer' else 'lower'} config.loss.chunk_sparsity.weight"

    def parameters(self, width, num_experts):
        """The matrix of the logits, and the scale of the gates' norm."""
        gamma = Parameter((num_experts,), init="ones", decay=False)
        return {"router_DE": Parameter((width, num_experts)), "gamma_E": gamma}

    def __call__(self, params, given):
        """Routes T tokens; the order of choice is that of ReLU's gates, from the largest down."""
        logits_TE = masked_logits(given.logits_TE, given.valid_T)
        relu_TE = jax.nn.relu(logits_TE)
        gate_TE = normalized_gates(relu_TE, params["gamma_E"])
        _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(relu_TE), relu_TE.shape[-1])
        keep_TK = jnp.take_along_axis(relu_TE, expert_TK, axis=-1) > 0
        routing = fill_slots(gate_TE, logits_TE, expert_TK, keep_TK, renormalize=False)
        return dataclasses.replace(routing, probs_TE=relu_TE)


def normalized_gates(
    gate_TE: Float[Array, "T E"], gamma_E: Float[Array, "E"]
) -> Float[Array, "T E"]:
    """RMSNorm over the experts of each token: zeros stay zeros, and scale does not matter."""
    mean_square_T1 = jnp.mean(jnp.square(gate_TE), axis=-1, keepdims=True)
    return gate_TE * jax.lax.rsqrt(mean_square_T1 + EPSILON) * gamma_E
