"""Choice of expert compute: from settings to a backend."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.experts.capacity import capacity_experts
from dynmoe_jax.experts.kernels.choice import (
    SETTING,
    available_for,
    check_request,
    choose_products,
    make_products,
)
from dynmoe_jax.experts.kernels.cpu.blocks import block_experts
from dynmoe_jax.experts.kernels.cpu.native import native_experts
from dynmoe_jax.experts.kernels.grouped import ragged_experts
from dynmoe_jax.experts.kinds.kind import Arrays, ExpertKind
from dynmoe_jax.experts.reference import reference_experts
from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.used_blocks import UsedBlocks
from dynmoe_jax.experts.weights import ExpertWeights
from dynmoe_jax.hardware.choice import AUTO, check
from dynmoe_jax.hardware.target import Target, current_target
from dynmoe_jax.mesh.axes import on_one_device

Backend = Callable[
    [Float[Array, "T D"], Rows, ExpertWeights | Arrays],
    tuple[Float[Array, "T D"], Int[Array, ""]],
]
"""(x_TD, rows, weights) -> (y_TD, rows dropped): the one signature of expert compute.  Weights of a
kind that does not store what kernels read are arrays by the names of its parameters."""


GROUPED = ("auto", "grouped")

PLAIN = "blocks"
"""The grouped product of plain JAX that is not dense over the experts on any platform."""

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


@dataclasses.dataclass(frozen=True)
class Densified:
    """Experts of a kind that can be written as those that kernels know.

    Attributes:
      kind: of the experts.
      backend: for :class:`ExpertWeights`.
    """

    kind: ExpertKind
    backend: Backend

    def __call__(self, x_TD, rows, weights):
        """See :data:`Backend`."""
        return self.backend(x_TD, rows, self.kind.dense(weights))


def no_kernels(moe: config.MoE) -> str:
    """Says what computes experts that kernels do not know; empty where kernels may."""
    if moe.expert_kind.dense is not None or moe.backend not in GROUPED:
        return ""
    return (
        f"Kernels do not know experts of the kind config.model.moe.experts={moe.experts!r}: a loop "
        "over used blocks in plain JAX computes them."
    )


def reads_in_stack(moe: config.MoE, width: int, dtype: jnp.dtype, plain: bool = False) -> bool:
    """Whether experts are read where an :class:`StackedView` says, by the backend of the settings.

    Args:
      moe: the settings.
      width: D.
      dtype: of the computation.
      plain: no kernels.
    """
    target = current_target()
    if plain or moe.backend not in GROUPED or not moe.expert_kind.stored_dense:
        return False
    if not on_one_device():
        return False
    available = available_for(target.platform)
    widths = width, moe.hidden_width
    return choose_products(moe.grouped_product, target, available, dtype, *widths) == "native"


def make_backend(moe: config.MoE, target: Target | None = None, plain: bool = False) -> Backend:
    """The backend that ``config.model.moe.backend`` names; ``auto`` is ``grouped``.

    The same settings and target give the same object, so that decoders of the same settings
    compare equal and compile once.

    Args:
      moe: the settings.
      target: what the program will run on; by default :func:`current_target`.
      plain: ``config.model.kernels="plain"``: by products that any platform has.

    Raises:
      ConfigError: the settings ask for what cannot run there.
    """
    if plain and moe.grouped_product == AUTO and moe.expert_kind.dense is not None:
        moe = dataclasses.replace(moe, grouped_product=PLAIN)
    return _backend(moe, target or current_target())


@functools.cache
def _backend(moe: config.MoE, target: Target) -> Backend:
    kind = moe.expert_kind
    if moe.backend in GROUPED and kind.dense is None:
        obstacle = f"multiplies in SwiGLU experts, not in config.model.moe.experts={moe.experts!r}"
        check(SETTING, moe.grouped_product, "" if moe.grouped_product == AUTO else obstacle)
        return UsedBlocks(kind)
    if moe.backend in GROUPED:
        known = grouped_experts(moe, target)
        return known if kind.stored_dense else Densified(kind, known)
    kind = None if kind.stored_dense else kind
    return {
        "capacity": partial(capacity_experts, factor=moe.capacity_factor, kind=kind),
        "reference": partial(reference_experts, kind=kind),
    }[moe.backend]
