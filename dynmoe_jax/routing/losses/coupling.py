"""Expert-router coupling: an expert answers its own router row more than those of others.

ERC, arXiv 2512.23447.

Axis legend: D model width, E experts, F hidden width of an expert.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import (
    RoutingLoss,
    controller_setting,
    times_tokens,
    weight_setting,
)


@LOSSES.register("coupling")
@dataclasses.dataclass(frozen=True)
class Coupling(RoutingLoss):
    """1/E^2 sum_{i != j} [relu(M_ij - a M_ii) + relu(M_ji - a M_ii)].

    M_ij is the length of W r_i, W the gate matrix of expert j and r_i row i of the router, each
    number times one between 1 - eps_i and 1 + eps_i; eps_i is half the distance to the nearest row
    over the length of its own.  Costs E^2 vectors, and no token.
    """

    weight: float = weight_setting(help="of the coupling of experts with their router rows (1)")
    slack: float = free_setting(
        1.0, "others may answer a row by this share of its own expert (alpha)", low=0.0, high=1.0
    )
    controller: str = controller_setting()
    label = "coupling"
    # Slots that experts have several of choose nobody, and have rows of their own.
    needs = frozenset({"router_DE", "gate_up_ED2F", "counts"})
    reads = frozenset({"noise"})

    def sums(self, routing, given, params):
        """The loss, once for every token."""
        # Rows of free experts, which have no matrix, stand behind the others.
        row_ED = params["router_DE"].T[: len(params["gate_up_ED2F"])]
        if given.layer_key is not None:
            row_ED = row_ED * self._noise(row_ED, jax.random.wrap_key_data(given.layer_key))
        gate_EDF, _ = jnp.split(params["gate_up_ED2F"].astype(jnp.float32), 2, axis=-1)
        answer_EEF = jnp.einsum("id,jdf->ijf", row_ED, gate_EDF)
        length_EE = _length(answer_EEF)
        own_E1 = self.slack * jnp.diagonal(length_EE)[:, None]
        over_EE = jax.nn.relu(length_EE - own_E1) + jax.nn.relu(length_EE.T - own_E1)
        others_EE = 1.0 - jnp.eye(row_ED.shape[0])
        loss = jnp.sum(others_EE * over_EE) / row_ED.shape[0] ** 2
        return {"coupling": times_tokens(loss, given)}

    def value(self, sums, tokens):
        """The mean."""
        return sums["coupling"] / tokens

    def _noise(self, row_ED, key):
        """Factors around 1, so far that a row stays nearest to itself; they carry no gradient."""
        row_ED = jax.lax.stop_gradient(row_ED)
        itself_EE = jnp.eye(row_ED.shape[0], dtype=bool)
        distance_EE = _length(row_ED[:, None] - row_ED[None])
        nearest_E = jnp.min(jnp.where(itself_EE, jnp.inf, distance_EE), axis=-1)
        eps_E = jnp.minimum(nearest_E / (2 * jnp.maximum(_length(row_ED), 1e-20)), 1.0)
        return 1 + eps_E[:, None] * jax.random.uniform(key, row_ED.shape, minval=-1, maxval=1)


def _length(x_X):
    """Euclidean length along the last axis; its slope at 0 is 0."""
    squared = jnp.sum(jnp.square(x_X), axis=-1)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
