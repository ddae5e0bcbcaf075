"""Choice of expert compute: from settings to a backend."""

import functools
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.experts.capacity import capacity_experts
from dynmoe_jax.experts.kernels.choice import (
    available_for,
    check_request,
    choose_products,
    make_products,
)
from dynmoe_jax.experts.kernels.cpu.blocks import block_experts
from dynmoe_jax.experts.kernels.cpu.native import native_experts
from dynmoe_jax.experts.kernels.grouped import ragged_experts
from dynmoe_jax.experts.reference import reference_experts
from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.weights import ExpertWeights
from dynmoe_jax.hardware.target import Target, current_target
from dynmoe_jax.mesh.axes import on_one_device

Backend = Callable[
    [Float[Array, "T D"], Rows, ExpertWeights], tuple[Float[Array, "T D"], Int[Array, ""]]
]
"""(x_TD, rows, weights) -> (y_TD, rows dropped): the one signature of expert compute."""


GROUPED = ("auto", "grouped")

CPU_EXPERTS = {"native": native_experts, "blocks": block_experts}
"""These compute whole experts; other names are of grouped products, for :func:`ragged_experts`."""


def grouped_experts(moe: config.MoE, target: Target) -> Backend:
    """The dropless backend: :func:`choose_products` decides what computes it.

    Raises:
      ConfigError: ``config.model.moe.grouped_product`` asks for what cannot run on ``target``.
    """
    available = available_for(target.platform)
    check_request(moe.grouped_product, target, available)

    def apply(x_TD, rows, weights):
        widths = x_TD.shape[-1], weights.hidden_width
        name = choose_products(moe.grouped_product, target, available, x_TD.dtype, *widths)
        saved = saved_rows_per_token(moe)
        if name in CPU_EXPERTS:
            return CPU_EXPERTS[name](x_TD, rows, weights, saved_rows_per_token=saved)
        return ragged_experts(
            *(x_TD, rows, weights),
            products=make_products(name, target),
            saved_rows_per_token=saved,
            usual_rows_per_token=usual_rows_per_token(moe),
        )

    return apply


def usual_rows_per_token(moe: config.MoE) -> float:
    """Rows per token that memory is laid out for: those that the router usually chooses."""
    return moe.route.bounds(moe.num_experts).usual_rows


def saved_rows_per_token(moe: config.MoE) -> float:
    """Rows per token that keep activations: the setting, or the usual number.

    Top-8 with two rows kept would compute gate and up of the other six twice.
    """
    asked = moe.saved_rows_per_token
    return usual_rows_per_token(moe) if asked == config.AUTO else asked


def reads_in_stack(moe: config.MoE, width: int, dtype: jnp.dtype) -> bool:
    """Whether experts are read where an :class:`StackedView` says, by the backend of the settings.

    Args:
      moe: the settings.
      width: D.
      dtype: of the computation.
    """
    target = current_target()
    if moe.backend not in GROUPED or not on_one_device():
        return False
    available = available_for(target.platform)
    widths = width, moe.hidden_width
    return choose_products(moe.grouped_product, target, available, dtype, *widths) == "native"


def make_backend(moe: config.MoE, target: Target | None = None) -> Backend:
    """The backend that ``config.model.moe.backend`` names; ``auto`` is ``grouped``.

    The same settings and target give the same object, so that decoders of the same settings
    compare equal and compile once.

    Args:
      moe: the settings.
      target: what the program will run on; by default :func:`current_target`.

    Raises:
      ConfigError: the settings ask for what cannot run there.
    """
    return _backend(moe, target or current_target())


@functools.cache
def _backend(moe: config.MoE, target: Target) -> Backend:
    if moe.backend in GROUPED:
        return grouped_experts(moe, target)
    return {
        "capacity": partial(capacity_experts, factor=moe.capacity_factor),
        "reference": reference_experts,
    }[moe.backend]
