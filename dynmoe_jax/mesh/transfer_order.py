"""The order in which parameters and gradients travel while a layer computes.

Nothing here changes a value.  A compiler sends a gradient when somebody asks for it, which may be
at the end of a layer, when nothing is left to compute meanwhile; :func:`in_transfer_order` makes it
ask earlier.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from dynmoe_jax.mesh.axes import on_one_device
from dynmoe_jax.mesh.collectives import GATHERED


def in_transfer_order(
    compute: Callable[[Any], tuple[Array, Any]], inputs: Any, travelling: Any
) -> tuple[Array, Any, Any]:
    """Computes the first half of a layer while the parameters of the second half travel.

    In backward their gradients are sent as soon as the inputs' gradients are there, and what is
    computed again of the first half fills the time.

    Args:
      compute: ``inputs -> (activations, anything else)``.
      inputs: of the first half, such as queries, keys and values.
      travelling: parameters of the second half.

    Returns:
      the activations, whatever else ``compute`` returned, and the parameters.
    """
    inputs, travelling = gradients_together((inputs, travelling))
    activations, others = compute(inputs)
    return behind(activations, inputs), others, travelling


def gradients_together(values: Any) -> Any:
    """The values; backward goes on with the gradient of any of them when it has them all.

    Nobody waits for the gradient of a parameter before the end of its layer's backward pass, so a
    compiler may send it at the end, when nothing is left to compute (docs/measurements.md:
    v6e-late-gradients).  Together with the gradient of an activation it is sent in time.  On one
    device nothing travels, and a scan over layers would keep a copy of each parameter
    (docs/measurements.md: cpu-parameter-copies).
    """
    return values if on_one_device() else _together(values)


@jax.custom_vjp
def _together(values):
    # Nothing is kept of it: the values themselves are there.
    return checkpoint_name(values, GATHERED)


def _together_forward(values):
    return _together(values), None


def _together_backward(_, gradients):
    return (jax.lax.optimization_barrier(gradients),)


_together.defvjp(_together_forward, _together_backward)


def behind(value: Array, others: Any) -> Array:
    """The value, for those who read it once the others are computed.

    A compiler puts off what backward computes again until somebody reads it.  But while the experts
    of a layer travel, there is little else to compute, and queries, keys and values fill the wait
    (docs/measurements.md: v6e-filled-waits).
    """
    return value if on_one_device() else _behind(value, others)


@jax.custom_vjp
def _behind(value, others):
    value, _ = jax.lax.optimization_barrier((value, others))
    return checkpoint_name(value, GATHERED)  # nothing is kept of it either


def _behind_forward(value, others):
    return _behind(value, others), others


def _behind_backward(others, gradient):
    return gradient, jax.tree.map(jnp.zeros_like, others)


_behind.defvjp(_behind_forward, _behind_backward)
