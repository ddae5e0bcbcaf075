"""Plain matrices."""

import dataclasses

from dynmoe_jax.model.linear.kind import LinearKind
from dynmoe_jax.registry import LINEARS
from dynmoe_jax.routing import Parameter


@LINEARS.register("dense")
@dataclasses.dataclass(frozen=True)
class Dense(LinearKind):
    """A matrix, and nothing else."""

    def parameters(self, name, shape):
        """The matrix."""
        return {name: Parameter(shape)}

    def dense(self, name, arrays):
        """The matrix itself."""
        return arrays[name]
