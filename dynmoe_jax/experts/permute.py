"""Rows moved to other positions, forward and backward without a scatter.

Axis legend: T positions moved from, C positions moved to, X any axes.
"""

import jax
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def take(
    x_TX: Float[Array, "T *X"], from_C: Int[Array, "C"], to_T: Int[Array, "T"]
) -> Float[Array, "C *X"]:
    """Gathers row ``from_C`` of x for each position; zeros where that is T.

    Every row goes to one position at most, and ``to_T`` says to which (C: to none), so backward is
    a gather as well.  Autodiff would write a scatter, for which a TPU sorts all indices first.
    """
    return x_TX.at[from_C].get(mode="fill", fill_value=0)


def _take_forward(x_TX, from_C, to_T):
    return take(x_TX, from_C, to_T), (from_C, to_T)


def _take_backward(moved, dx_CX):
    from_C, to_T = moved
    return take(dx_CX, to_T, from_C), None, None


take.defvjp(_take_forward, _take_backward)
