"""LoRA (arXiv 2106.09685): a matrix plus a product of two narrow ones, which begins at zero.

With ``config.train.trainable='lora'`` the narrow ones alone are trained.

Axis legend: R rank (the axes of the matrix: D, H, G, W, F).
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import model_setting
from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.model.linear.kind import (
    LinearKind,
    input_axes,
    matrix_names,
    obstacle_of_targets,
)
from dynmoe_jax.registry import LINEARS
from dynmoe_jax.routing import Parameter


@LINEARS.register("lora")
@dataclasses.dataclass(frozen=True)
class LoRA(LinearKind):
    """``W + scale A B``, with A normal and B zero."""

    begins_dense = True

    rank: int = model_setting(8, "inner width of A B", low=1, per_layer=True)
    scale: float = model_setting(2.0, "factor of A B: alpha / rank", above=0.0)
    targets: str = model_setting(
        "query|value",
        "regular expression that finds the names of matrices that have A B, of: "
        + ", ".join(matrix_names()),
    )

    def obstacle(self):
        """Refuses targets that find nothing."""
        return obstacle_of_targets(self.targets, matrix_names())

    def parameters(self, name, shape):
        """The matrix, and for a target A (its inputs, rank) and B (rank, its outputs)."""
        found = {name: Parameter(shape)}
        if re.search(self.targets, name):
            inputs = input_axes(name)
            a_name, b_name = _names(name)
            found[a_name] = Parameter((*shape[:inputs], self.rank), _by_inputs)
            found[b_name] = Parameter((self.rank, *shape[inputs:]), "zeros")
        return found

    def dense(self, name, arrays):
        """W + scale A B."""
        if len(arrays) == 1:
            return arrays[name]
        a_name, b_name = _names(name)
        return arrays[name] + self.scale * jnp.tensordot(arrays[a_name], arrays[b_name], 1)


def _by_inputs(key, shape):
    """Draws A so that x A has the size of x, whatever the model's matrices begin with."""
    return jax.random.normal(key, shape, jnp.float32) / math.sqrt(math.prod(shape[:-1]))


def _names(name: str) -> tuple[str, str]:
    """The names of A and B: ``query_lora_DR`` and ``query_lora_RHW`` of ``query_DHW``."""
    stem, axes, inputs = name.rsplit("_", 1)[0], axes_of(name), input_axes(name)
    ends = ("".join(axes[:inputs]) + "R", "R" + "".join(axes[inputs:]))
    return f"{stem}_lora_{ends[0]}", f"{stem}_lora_{ends[1]}"
