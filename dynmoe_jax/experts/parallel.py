"""Expert compute over a device mesh.

Axis legend: T tokens, D model width.
"""

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.backend import Backend
from dynmoe_jax.experts.rows import rows_from_routing
from dynmoe_jax.experts.weights import ExpertWeights
from dynmoe_jax.routing import Routing


def apply_experts(
    x_TD: Float[Array, "T D"],
    routing: Routing,
    weights: ExpertWeights,
    backend: Backend,
    rows_per_token: float = 0.0,
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """Sends every token to its experts and combines what they return.

    Under a mesh (``jax.set_mesh``) the tokens are split over its ``data`` axis; each device lays
    out and computes the rows of its own tokens, with all experts.

    Args:
      x_TD: tokens.
      routing: their routing.
      weights: all experts.
      backend: expert compute.
      rows_per_token: row budget, see :func:`rows_from_routing`; it holds per device.

    Returns:
      y_TD, and the number of rows dropped over all devices.
    """

    def local(x_TD, routing, weights):
        rows = rows_from_routing(routing, rows_per_token)
        y_TD, dropped = backend(x_TD, rows, weights)
        return y_TD, dropped + rows.dropped

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["data"] == 1:
        return local(x_TD, routing, weights)

    def on_each_device(x_TD, routing, weights):
        y_TD, dropped = local(x_TD, routing, weights)
        return y_TD, jax.lax.psum(dropped, "data")

    return jax.shard_map(
        on_each_device,
        in_specs=(P("data"), P("data"), P()),
        out_specs=(P("data"), P()),
        # The backends' loops start from plain zeros, which the varying-axes check refuses.
        check_vma=False,
    )(x_TD, routing, weights)
