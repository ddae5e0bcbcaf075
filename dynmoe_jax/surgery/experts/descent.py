"""Steps of an optimizer on samples, in one program.

Axis legend: P steps, B samples of a step.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Float, Int

Params = Any
"""A tree of arrays."""


def descended(
    loss: Callable[[Params, Int[Array, "B"]], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    params: Params,
    order_PB: Int[Array, "P B"],
) -> Params:
    """Parameters after the steps of an optimizer.

    Args:
      loss: of parameters, on the samples of these numbers.
      optimizer: of the steps.
      params: to begin with.
      order_PB: numbers of the samples of each step.
    """

    def step(carry, rows_B):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rows_B), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), order_PB)
    return params
