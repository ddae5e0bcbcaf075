"""Matrices of a module, each by the kind that the settings name.

Axis legend: X all leading axes of an input, I inputs side by side, O outputs side by side.
"""

import dataclasses
import zlib
from collections.abc import Mapping

import jax
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax import config
from dynmoe_jax.model.components import drawn
from dynmoe_jax.model.linear.kind import LinearKind
from dynmoe_jax.registry import chosen

_PURPOSE = 0x6C696E65
"""Number folded into the keys of what kinds add, so that all other draws stay what they are."""


@dataclasses.dataclass(frozen=True)
class Matrices:
    """The matrices that a module has by name, each made of one parameter or several.

    Attributes:
      kind: of all of them.
      names: (name of a matrix, names of its parameters).
    """

    kind: LinearKind
    names: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def drawn(
        cls,
        module: nnx.Module,
        model: config.Model,
        shapes: Mapping[str, tuple[int, ...]],
        rngs: nnx.Rngs,
    ) -> "Matrices":
        """Gives a module the parameters of its matrices.

        Args:
          module: which gets an attribute for each parameter.
          model: the settings.
          shapes: of the matrices, by name, in the order in which they are drawn.
          rngs: keys.
        """
        kind = chosen(model, "linear")
        declared = {name: kind.parameters(name, shape) for name, shape in shapes.items()}
        first = jax.random.fold_in(rngs.params.key[...], rngs.params.count[...])
        for matrix, parameters in declared.items():
            if matrix not in parameters:
                rngs.params()  # the draw of the matrix, so that all later ones are the same
            for name, parameter in parameters.items():
                keys = rngs if name == matrix else _own_keys(first, name)
                setattr(module, name, drawn(keys, parameter, model.init_std))
        return cls(kind, tuple((matrix, tuple(names)) for matrix, names in declared.items()))

    def whole(self, module: nnx.Module, name: str) -> Float[Array, "..."]:
        """A matrix, float32."""
        return self.kind.dense(name, self._arrays(module, name))

    def applied(
        self, module: nnx.Module, name: str, x_XI: Float[Array, "*X I"]
    ) -> Float[Array, "*X O"]:
        """The product with a matrix by the kind's own :attr:`LinearKind.apply`."""
        arrays = self._arrays(module, name)
        cast = {name: array.astype(x_XI.dtype) for name, array in arrays.items()}
        return self.kind.apply(name, cast, x_XI)

    @property
    def apply_themselves(self) -> bool:
        """Whether the kind has a product of its own with some of them."""
        return any(self.kind.applies(name) for name, _ in self.names)

    def _arrays(self, module: nnx.Module, name: str) -> dict[str, Array]:
        return {each: getattr(module, each)[...] for each in dict(self.names)[name]}


def _own_keys(first: Array, name: str) -> nnx.Rngs:
    """Keys of a parameter that a kind adds.

    Args:
      first: key of the module's first matrix.
      name: of the parameter.
    """
    purpose = jax.random.fold_in(first, _PURPOSE)
    return nnx.Rngs(params=jax.random.fold_in(purpose, zlib.crc32(name.encode())))
