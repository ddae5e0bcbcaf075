"""Interface of kinds of matrices: what stands for the matrix of a linear map.

Axis legend: D model width, H query heads, G key/value heads, W head width, F hidden width, X all
leading axes of an input.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from jaxtyping import Array, Float

from dynmoe_jax.experts.kinds.kind import matrices_in, without_experts
from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.registry import EXPERTS
from dynmoe_jax.routing import Parameter

Arrays = Mapping[str, Array]
"""Arrays by the names of their parameters."""

_OF_ATTENTION = ("query_DHW", "key_DGW", "value_DGW", "output_HWD")


def matrix_names() -> tuple[str, ...]:
    """Names of all matrices that have a kind: of attention, and of dense feed-forwards, whatever
    ``config.model.activation`` names."""
    found = list(_OF_ATTENTION)
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

    @abc.abstractmethod
    def dense(self, name: str, arrays: Arrays) -> Float[Array, "..."]:
        """The whole matrix, float32, differentiable.

        Args:
          name: of the matrix.
          arrays: of its parameters.
        """


def input_axes(name: str) -> int:
    """Number of the leading axes of a matrix that are summed over: 1 of DHW, 2 of HWD."""
    axes = axes_of(name)
    return 1 if axes[0] == "D" else len(axes) - 1
