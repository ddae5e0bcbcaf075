"""Rematerialization: what backward keeps of a layer, and what it computes again
(``config.model.remat``)."""

from collections.abc import Callable

import jax

from dynmoe_jax.mesh.axes import on_one_device
from dynmoe_jax.mesh.collectives import COMPUTED_AGAIN, keep_all_but_gathered

_ELEMENTWISE = {
    *("abs", "add", "add_any", "and", "convert_element_type", "copy", "cos", "div", "eq", "erf"),
    *("exp", "exp2", "expm1", "ge", "gt", "integer_pow", "iota", "is_finite", "le", "log", "log1p"),
    *("logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "reduce_precision"),
    *("rem", "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "stop_gradient", "sub"),
    *("tanh", "xor"),
}
_SHAPES = {
    *("broadcast_in_dim", "concatenate", "dynamic_slice", "expand_dims", "pad", "reshape", "rev"),
    *("slice", "split", "squeeze", "transpose"),
}


def remat_policy(remat: str) -> Callable | None:
    """Policy of ``jax.checkpoint`` for a layer: what it keeps for backward; None: nothing has to be
    left out.

    Parameters that were put together for a layer are never kept: all layers together would be the
    whole model on every device.

    Args:
      remat: ``config.model.remat``.
    """
    policies = jax.checkpoint_policies
    if remat == "none":
        return None if on_one_device() else keep_all_but_gathered
    return {
        "elementwise": _keep_what_is_dear,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "layer": policies.nothing_saveable,
    }[remat]


def _keep_what_is_dear(primitive, *avals, **settings) -> bool:
    """Products, kernels, sums, sorts and gathers; not the arithmetic between them.

    Nor kernels that say of what they make that it is computed again as cheaply.

    A compiler fuses that into what reads it, while what is kept is written by one loop over the
    layers and read by the other.
    """
    if primitive.name in _ELEMENTWISE | _SHAPES:
        return False
    if primitive.name == "custom_vjp_call":
        named = (
            e.params["name"] for e in settings["call_jaxpr"].eqns if e.primitive.name == "name"
        )
        if COMPUTED_AGAIN in named:
            return False
    return keep_all_but_gathered(primitive, *avals, **settings)
