"""Fits of routers that foretell how long the outputs of experts are (D2DMoE, arXiv 2310.04361).

Axis legend: S sampled tokens, E experts, D model width, U hidden units of the router, P steps, B
tokens of a step.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int

from dynmoe_jax.routing.routers.threshold import Threshold
from dynmoe_jax.surgery.experts.descent import descended
from dynmoe_jax.surgery.experts.router_fit import Params


def first_router(
    width: int, units: int, norm_SE: Float[np.ndarray, "S E"], random: np.random.Generator
) -> dict[str, np.ndarray]:
    """A router that says the mean norm of each expert, nearly, whatever the token is."""
    experts = norm_SE.shape[1]
    inner_DU = random.standard_normal((width, units)) * np.sqrt(2 / width)
    outer_UE = random.standard_normal((units, experts)) * (0.1 * norm_SE.std() / np.sqrt(units))
    found = {
        "router_in_DU": inner_DU,
        "router_in_bias_U": np.zeros(units),
        "router_out_UE": outer_UE,
        "router_out_bias_E": norm_SE.mean(axis=0),
    }
    return {name: np.asarray(array, np.float32) for name, array in found.items()}


def fitted_to_norms(
    route: Threshold,
    params: Params,
    input_SD: Float[np.ndarray, "S D"],
    norm_SE: Float[np.ndarray, "S E"],
    order_PB: Int[np.ndarray, "P B"],
    rate: float,
) -> dict[str, np.ndarray]:
    """Parameters of a router after Adam's steps, whose rate falls as a cosine, on squared errors.

    Args:
      route: the router.
      params: to begin with.
      input_SD: what it reads.
      norm_SE: what its scores are to be.
      order_PB: numbers of the samples of each step.
      rate: learning rate at first.
    """
    # In units of the spread, so that the rate means the same of every layer.
    unit = max(float(norm_SE.std()), 1e-12)
    scaled = {name: array / (unit if "_out_" in name else 1) for name, array in params.items()}
    given = scaled, input_SD, np.asarray(norm_SE / unit, np.float32), order_PB
    found = jax.device_get(_descended(route, rate, *given))
    return {
        name: array * np.float32(unit if "_out_" in name else 1) for name, array in found.items()
    }


def scores_of(
    route: Threshold, params: Params, input_SD: Float[np.ndarray, "S D"]
) -> Float[np.ndarray, "S E"]:
    """Norms that a router foretells."""
    experts = len(params["router_out_bias_E"])
    return np.abs(np.asarray(route.logits(params, jnp.asarray(input_SD), experts)))


def r_squared(score_SE: Float[np.ndarray, "S E"], norm_SE: Float[np.ndarray, "S E"]) -> float:
    """Share of the variance of norms, around the mean of each expert, that scores explain."""
    spread = np.square(norm_SE - norm_SE.mean(axis=0)).sum(dtype=np.float64)
    return float(1 - np.square(score_SE - norm_SE).sum(dtype=np.float64) / max(spread, 1e-30))


@partial(jax.jit, static_argnums=(0, 1))
def _descended(route, rate, params, input_SD, norm_SE, order_PB):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, order_PB.shape[0]))

    def loss(params, rows_B):
        logits_BE = route.logits(params, input_SD[rows_B], norm_SE.shape[1])
        return jnp.mean(jnp.square(jnp.abs(logits_BE) - norm_SE[rows_B]))

    return descended(loss, optimizer, params, order_PB)
