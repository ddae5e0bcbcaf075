"""Nets of two layers in place of the matrices of attention (D2DMoE, arXiv 2310.04361, step 2).

Axis legend: U hidden units of a net (the axes of the matrix: D, H, G, W).
"""

import dataclasses
import math
import re

import jax

from dynmoe_jax.fields import model_setting
from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.model.linear.kind import (
    ATTENTION,
    LinearKind,
    input_axes,
    obstacle_of_targets,
)
from dynmoe_jax.registry import LINEARS
from dynmoe_jax.routing import Parameter


@LINEARS.register("two_layer")
@dataclasses.dataclass(frozen=True)
class TwoLayer(LinearKind):
    """``relu(x A + a) B + b`` in place of ``x W`` in attention; other matrices stay.

    A matrix of I inputs and O outputs gets ``factor (I O + O) / (I + O + 1)`` hidden units: at a
    factor of 1 as many parameters as a matrix with a bias.
    """

    factor: float = model_setting(
        1.0,
        "parameters of a net, beside those of the matrix that it replaces",
        above=0.0,
        high=1000.0,
    )
    targets: str = model_setting(
        "query|key|value|output",
        "regular expression that finds the names of matrices that are replaced, of: "
        + ", ".join(ATTENTION),
    )

    def obstacle(self):
        """Refuses targets that find nothing."""
        return obstacle_of_targets(self.targets, ATTENTION)

    def applies(self, name):
        """Whether a net stands for the matrix."""
        return name in ATTENTION and bool(re.search(self.targets, name))

    def units(self, name: str, shape: tuple[int, ...]) -> int:
        """Number of hidden units of the net that stands for a matrix."""
        inputs, outputs = _sizes(name, shape)
        return max(1, round(self.factor * (inputs + 1) * outputs / (inputs + outputs + 1)))

    def parameters(self, name, shape):
        """Both layers of a net, each with a bias; or the matrix."""
        if not self.applies(name):
            return {name: Parameter(shape)}
        inputs, units = input_axes(name), self.units(name, shape)
        shapes = (*shape[:inputs], units), (units,), (units, *shape[inputs:]), shape[inputs:]
        first, first_bias, last, last_bias = zip(net_names(name), shapes, strict=True)
        matrices = {name: Parameter(shape) for name, shape in (first, last)}
        return matrices | {
            name: Parameter(shape, "zeros") for name, shape in (first_bias, last_bias)
        }

    def flops(self, name, shape):
        """Counts both layers of a net."""
        if not self.applies(name):
            return super().flops(name, shape)
        return 2.0 * self.units(name, shape) * sum(_sizes(name, shape))

    def dense(self, name, arrays):
        """The matrix, where no net stands for it."""
        if self.applies(name):
            raise TypeError(f"{name} is a net of two layers, which no matrix computes")
        return arrays[name]

    def apply(self, name, arrays, x_XI):
        """The output of the net, or the product with the matrix."""
        if not self.applies(name):
            return x_XI @ arrays[name].reshape(x_XI.shape[-1], -1)
        first, first_bias_U, second, second_bias = (arrays[each] for each in net_names(name))
        units = len(first_bias_U)
        hidden_XU = jax.nn.relu(x_XI @ first.reshape(-1, units) + first_bias_U)
        return hidden_XU @ second.reshape(units, -1) + second_bias.reshape(-1)


def net_names(name: str) -> tuple[str, str, str, str]:
    """Names of the parameters of a net: ``query_in_DU``, ``query_in_bias_U``, ``query_out_UHW`` and
    ``query_out_bias_HW`` of ``query_DHW``."""
    stem, axes, inputs = name.rsplit("_", 1)[0], axes_of(name), input_axes(name)
    first, last = "".join(axes[:inputs]), "".join(axes[inputs:])
    ends = f"in_{first}U", "in_bias_U", f"out_U{last}", f"out_bias_{last}"
    return tuple(f"{stem}_{end}" for end in ends)


def _sizes(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(number of inputs, number of outputs) of a matrix."""
    inputs = input_axes(name)
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])
