"""The function of a kind of expert over a device mesh, where all tokens use it.

Axis legend: T tokens, E experts (here one), D model width, F hidden width.
"""

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dynmoe_jax.experts.kinds.kind import Arrays, ExpertKind, without_experts
from dynmoe_jax.experts.parallel.shard import in_full, in_part
from dynmoe_jax.mesh.axes import BATCH, MODEL, mesh_sizes, on_one_device, parameter_spec
from dynmoe_jax.mesh.collectives import each_device, sum_over


def apply_to_all(
    kind: ExpertKind, x_TD: Float[Array, "T D"], arrays: Arrays
) -> Float[Array, "T D"]:
    """Computes a kind's function of every token.

    On a mesh each device computes its own tokens, with the part of the hidden units that ``model``
    gives it, where the kind allows that.

    Args:
      kind: of the function.
      x_TD: tokens, in the compute type.
      arrays: of the kind's parameters, by their names, in the compute type, without the axis E;
        they lie as :func:`~dynmoe_jax.experts.kinds.kind.without_experts` of a name says.
    """
    return _on_each_device(kind, kind.apply, x_TD, arrays, P(BATCH))


def hidden_of_all(
    kind: ExpertKind, x_TD: Float[Array, "T D"], arrays: Arrays
) -> tuple[Float[Array, "T D"], Float[Array, "T F"]]:
    """Computes a kind's function of every token, and what its nonlinear function is computed of.

    Args:
      kind: of the function, one that has hidden units.
      x_TD: tokens, in the compute type.
      arrays: as for :func:`apply_to_all`.

    Returns:
      (outputs, activations, see :class:`~dynmoe_jax.experts.kinds.kind.ExpertKind`).
    """

    def apply(weights, x_TD):
        activation_TF, hidden_TF = kind.hidden(weights, x_TD)
        return kind.output(weights, hidden_TF), activation_TF

    units = MODEL if kind.splits_hidden else None
    return _on_each_device(kind, apply, x_TD, arrays, (P(BATCH), P(BATCH, units)))


def _on_each_device(kind, function, x_TD, arrays, out_specs):
    """``function(arrays, x_TD)``, whose first result adds up over devices that have units each."""
    if on_one_device():
        return function(arrays, x_TD)
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
        found = function(weights, x_TD)
        if sizes[MODEL] == 1 or not kind.splits_hidden:
            return found
        if isinstance(found, tuple):
            return sum_over(found[0], MODEL), *found[1:]
        return sum_over(found, MODEL)

    return each_device(on_each_device, (P(BATCH), specs), out_specs)(x_TD, dict(arrays))
