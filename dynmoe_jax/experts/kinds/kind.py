"""Interface of kinds of experts: the function that one routed expert computes of a token, or a
dense feed-forward of all tokens.

Axis legend: E experts, R rows of one expert, D model width, F hidden width of an expert.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from jaxtyping import Array, Float

from dynmoe_jax.experts.weights import ExpertWeights
from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.routing import Parameter

Arrays = Mapping[str, Array]
"""Arrays of experts by the names of their parameters."""


def without_experts(name: str) -> str:
    """The name that a parameter of experts has in a dense feed-forward, where there is no axis E:
    ``up_DF`` of ``up_EDF``, ``scale`` of ``scale_E``."""
    stem, _ = name.rsplit("_", 1)
    axes = "".join(axes_of(name)[1:])
    return f"{stem}_{axes}" if axes else stem


def matrices_in(declared: Mapping[str, Parameter]) -> tuple[str, ...]:
    """Names of the parameters of experts that are matrices, drawn as all of the model's are."""
    return tuple(
        name for name, each in declared.items() if len(each.shape) == 3 and each.init == "normal"
    )


class ExpertKind(abc.ABC):
    """A kind of expert: a frozen dataclass whose fields are its settings.

    Derive from it, and write :meth:`parameters`, :meth:`apply` and :meth:`flops_per_row`: any such
    kind trains on any mesh, by a loop over used blocks (:mod:`dynmoe_jax.experts.used_blocks`).

    Attributes:
      dense: None, or a method (arrays of some experts, [E, ...]) -> :class:`ExpertWeights` that
        compute the same, with which every kernel for SwiGLU experts computes this kind.
      stored_dense: ``dense`` only gives other names to the parameters, so that kernels may read
        them where they lie among those of all layers.
      hidden: None, or a method (arrays of one expert, x_RD) -> (activation_RF, hidden_RF): its
        hidden units, and what their nonlinear function is computed of (the gate of a gated kind).
      output: with ``hidden``, a method (arrays of one expert, hidden_RF) -> y_RD, linear in them.
      splits_hidden: tensor parallelism may give each device a part of every axis F (and of both
        halves of 2F), since the outputs of the parts add up.  Otherwise each device puts whole
        experts together.  A bias of the output forbids it: every part would add it.
      degree: power of a factor on all matrices that comes out: f(c w) = c^degree f(w), of a kind
        that is not homogeneous about so.
      homogeneous: whether it is so exactly, for c > 0.
    """

    dense: ClassVar[Callable[[Any, Arrays], ExpertWeights] | None] = None
    stored_dense: ClassVar[bool] = False
    hidden: ClassVar[Callable[[Any, Arrays, Array], tuple[Array, Array]] | None] = None
    output: ClassVar[Callable[[Any, Arrays, Array], Array] | None] = None
    splits_hidden: ClassVar[bool] = False
    degree: ClassVar[int] = 2
    homogeneous: ClassVar[bool] = False

    @abc.abstractmethod
    def parameters(self, width: int, num_experts: int, hidden_width: int) -> dict[str, Parameter]:
        """Parameters of all experts of one layer by name, in the order in which they are drawn.

        Args:
          width: D.
          num_experts: E; every shape begins with it, and every name's axes with the letter.
          hidden_width: F.
        """

    @abc.abstractmethod
    def apply(self, weights: Arrays, x_RD: Float[Array, "R D"]) -> Float[Array, "R D"]:
        """Computes rows, each by itself, in plain JAX.

        Args:
          weights: of one expert, in the compute type, without the axis E.
          x_RD: rows, in the compute type.  For a row of zeros, which fills empty slots of the
            capacity backend, values and derivatives have to be finite.
        """

    @abc.abstractmethod
    def flops_per_row(self, width: int, hidden_width: int) -> float:
        """FLOPs of the matrix products of one row, forward (a multiply-add is two)."""

    def matrices(self, width: int, hidden_width: int) -> float:
        """Matrices of D x F that a row is multiplied by: three of SwiGLU."""
        return self.flops_per_row(width, hidden_width) / (2.0 * width * hidden_width)
