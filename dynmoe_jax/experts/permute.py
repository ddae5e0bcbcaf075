"""Rows moved to other places, forward and backward without a scatter.

Axis legend: T places moved from, C places moved to, X any axes.
"""

import jax
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def take(
    x_TX: Float[Array, "T *X"], from_C: Int[Array, "C"], to_T: Int[Array, "T"]
) -> Float[Array, "C *X"]:
    """Row ``from_C`` of x for each place; zeros where that is T.

    Every row goes to one place at most, and ``to_T`` says to which (C: to none), so backward is a
    gather as well.  Autodiff would write a scatter, for which a TPU sorts all indices first.
    """
    return x_TX.at[from_C].get(mode="fill", fill_value=0)


def _take_forward(x_TX, from_C, to_T):
    return take(x_TX, from_C, to_T), (from_C, to_T)


def _take_backward(places, dx_CX):
    from_C, to_T = places
    return take(dx_CX, to_T, from_C), None, None


take.defvjp(_take_forward, _take_backward)
