"""From settings to expert compute."""

import functools
from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.experts.blocks import block_experts
from dynmoe_jax.experts.capacity import capacity_experts
from dynmoe_jax.experts.ragged import ragged_experts
from dynmoe_jax.experts.reference import reference_experts
from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.weights import ExpertWeights

Backend = Callable[
    [Float[Array, "T D"], Rows, ExpertWeights], tuple[Float[Array, "T D"], Int[Array, ""]]
]
"""(x_TD, rows, weights) -> (y_TD, rows dropped): the one signature of expert compute."""


def grouped_experts(moe: config.MoE, platform: str) -> Backend:
    """The dropless backend of a platform: blocks on CPU, grouped matrix products elsewhere."""
    if platform == "cpu":
        return partial(block_experts, saved_rows_per_token=moe.saved_rows_per_token)
    return ragged_experts


@functools.cache
def make_backend(moe: config.MoE, platform: str | None = None) -> Backend:
    """The backend that ``config.model.moe.backend`` names; ``auto`` is ``grouped``.

    The same settings give the same object, so that decoders of the same settings compare equal
    and compile once.

    Args:
      moe: the settings.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``; by default the one that JAX runs on.
    """
    platform = platform or jax.default_backend()
    return {
        "auto": grouped_experts(moe, platform),
        "grouped": grouped_experts(moe, platform),
        "capacity": partial(capacity_experts, factor=moe.capacity_factor),
        "reference": reference_experts,
    }[moe.backend]
