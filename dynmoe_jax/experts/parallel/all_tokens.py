"""The function of a kind of expert over a device mesh, where all tokens use it.

Axis legend: T tokens, E experts (here one), D model width.
"""

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dynmoe_jax.experts.kinds.kind import Arrays, ExpertKind, without_experts
from dynmoe_jax.experts.parallel.shard import in_full, in_part
from dynmoe_jax.mesh.axes import BATCH, MODEL, mesh_sizes, on_one_device, parameter_spec
from dynmoe_jax.mesh.collectives import each_device, sum_over


def apply_to_all(kind: ExpertKind, x_TD: Float[Array, "T D"], arrays: Arrays) -> Array:
    """Computes a kind's function of every token.

    On a mesh each device computes its own tokens, with the part of the hidden units that ``model``
    gives it, where the kind allows that.

    Args:
      kind: of the function.
      x_TD: tokens, in the compute type.
      arrays: of the kind's parameters, by their names, in the compute type, without the axis E;
        they lie as :func:`~dynmoe_jax.experts.kinds.kind.without_experts` of a name says.
    """
    if on_one_device():
        return kind.apply(arrays, x_TD)
    sizes = mesh_sizes()
    specs = {
        name: parameter_spec(without_experts(name), array.shape, sizes)
        for name, array in arrays.items()
    }
    together = in_part if kind.splits_hidden else in_full

    def on_each_device(x_TD, arrays):
        weights = {
            name: together(name, part[None], P(None, *specs[name]))[0]
            for name, part in arrays.items()
        }
        y_TD = kind.apply(weights, x_TD)
        return sum_over(y_TD, MODEL) if sizes[MODEL] > 1 and kind.splits_hidden else y_TD

    return each_device(on_each_device, (P(BATCH), specs), P(BATCH))(x_TD, dict(arrays))
