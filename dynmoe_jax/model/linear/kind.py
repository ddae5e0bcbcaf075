"""Interface of kinds of matrices: what stands for the matrix of a linear map.

Axis legend: D model width, H query heads, G key/value heads, W head width, F hidden width, X all
leading axes of an input.
"""

import abc
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Array, Float

from dynmoe_jax import config
from dynmoe_jax.experts.kinds.kind import matrices_in, without_experts
from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.registry import EXPERTS
from dynmoe_jax.routing import Parameter

Arrays = Mapping[str, Array]
"""Arrays by the names of their parameters."""

ATTENTION = ("query_DHW", "key_DGW", "value_DGW", "output_HWD")
"""Names of the matrices of attention, in the order in which they are drawn."""


def attention_shapes(model: config.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices of attention by name, whose letters say them."""
    sizes = {"D": model.width, "H": model.num_heads, "G": model.num_kv_heads}
    sizes["W"] = model.head_width
    return {name: tuple(sizes[axis] for axis in axes_of(name)) for name in ATTENTION}


def matrix_names() -> tuple[str, ...]:
    """Names of all matrices that have a kind: of attention, and of dense feed-forwards, whatever
    ``config.model.activation`` names."""
    found = list(ATTENTION)
    for kind in EXPERTS.values():
        found += map(without_experts, matrices_in(kind().parameters(1, 1, 1)))
    return tuple(dict.fromkeys(found))


class LinearKind(abc.ABC):
    """A kind of matrix: a frozen dataclass whose fields are its settings.

    Attributes:
      begins_dense: it keeps the matrix, and what it adds to it begins at zero: a run may begin with
        a dense model (``config.train.init_from``).
      apply: None, for the product with :meth:`dense` by whatever kernel is best; else a method
        (name, arrays in the compute type, x_XI) -> y_XO, with all inputs of a matrix side by side
        in I and all outputs in O.
    """

    begins_dense: ClassVar[bool] = False
    apply: ClassVar[Callable[[Any, str, Arrays, Array], Array] | None] = None

    def obstacle(self) -> str | None:
        """Says why the settings do not fit any model: "NAME=VALUE must …"."""
        return None

    @abc.abstractmethod
    def parameters(self, name: str, shape: tuple[int, ...]) -> dict[str, Parameter]:
        """Parameters that stand for a matrix, by name; names end in axes, so that sharding follows.

        One called ``name`` is drawn as a dense matrix is, so that the same seed gives the same;
        others are drawn from keys of their own.

        Args:
          name: of the matrix, one of :func:`matrix_names`.
          shape: its axes, as the name has them.
        """

    def applies(self, name: str) -> bool:
        """Whether the product with a matrix is :attr:`apply`."""
        return self.apply is not None

    def flops(self, name: str, shape: tuple[int, ...]) -> float:
        """FLOPs of the product with a matrix, of one row."""
        return 2.0 * math.prod(shape)

    @abc.abstractmethod
    def dense(self, name: str, arrays: Arrays) -> Float[Array, "..."]:
        """The whole matrix, float32, differentiable.

        Args:
          name: of the matrix.
          arrays: of its parameters.
        """


def obstacle_of_targets(targets: str, names: Sequence[str]) -> str | None:
    """Says why a regular expression names no matrix: "targets=VALUE must …"; None where it does."""
    try:
        found = any(re.search(targets, name) for name in names)
    except re.error as error:
        return f"targets={targets!r} must be a regular expression, and has {error}"
    return None if found else f"targets={targets!r} must find one of {', '.join(names)}"


def input_axes(name: str) -> int:
    """Number of the leading axes of a matrix that are summed over: 1 of DHW, 2 of HWD."""
    axes = axes_of(name)
    return 1 if axes[0] == "D" else len(axes) - 1
