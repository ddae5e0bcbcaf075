"""Load-balancing loss over experts and free experts: sum_j w_j f_j P_j.

``j`` is an expert, or a group of some that need not balance among themselves; ``f_j`` is the mean
number of a token's choices in it (no gradient), ``P_j`` its mean router probability, and ``w_j``
what the router's paper says.

Axis legend: T tokens, E experts, J groups.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import (
    RoutingLoss,
    controller_setting,
    over_tokens,
    weight_setting,
)
from dynmoe_jax.routing.record import Routing


@LOSSES.register("free_balance")
@dataclasses.dataclass(frozen=True)
class FreeBalance(RoutingLoss):
    """The load-balancing loss of the whole batch, experts that cost no row included."""

    weight: float = weight_setting(help="of the load-balance loss over experts and free experts")
    controller: str = controller_setting()
    label = "load balance with free experts"
    needs = frozenset({"choices_TJ", "shares_TJ"})
    additive = False

    def sums(self, routing, given, params):
        """Choices and weighed probabilities of each group."""
        choices_J = over_tokens(routing.extra["choices_TJ"].astype(jnp.float32), given.valid_T)
        shares_J = over_tokens(routing.extra["shares_TJ"], given.valid_T)
        return {"choices_J": jax.lax.stop_gradient(choices_J), "shares_J": shares_J}

    def value(self, sums, tokens):
        """Sum over groups of the mean choices times the weighed mean probability."""
        return jnp.sum(sums["choices_J"] / tokens * sums["shares_J"] / tokens, axis=-1)


def with_groups(
    routing: Routing, choices_TJ: Int[Array, "T J"], shares_TJ: Float[Array, "T J"]
) -> Routing:
    """A routing with what the loss reads.

    Args:
      routing: the routing.
      choices_TJ: how many of each group a token has chosen.
      shares_TJ: w_j P_tj.
    """
    extra = {**routing.extra, "choices_TJ": choices_TJ, "shares_TJ": shares_TJ}
    return dataclasses.replace(routing, extra=extra)


def with_null_group(routing: Routing, null_T: Int[Array, "T"], nulls: int) -> Routing:
    """A routing whose null experts are one group beside the experts.

    (E + M) (sum_e f_e P_e + f_0 P_0 / M): as if every null expert had the mean load of all M.

    Args:
      routing: with the probabilities of null experts behind those of the others.
      null_T: null experts that each token has chosen.
      nulls: M.
    """
    experts = routing.num_experts
    real_TE, null_TM = routing.probs_TE[:, :experts], routing.probs_TE[:, experts:]
    probs_TJ = jnp.append(real_TE, jnp.sum(null_TM, axis=-1, keepdims=True) / nulls, axis=-1)
    choices_TJ = jnp.append(routing.chosen_TE.astype(jnp.int32), null_T[:, None], axis=-1)
    return with_groups(routing, choices_TJ, (experts + nulls) * probs_TJ)
