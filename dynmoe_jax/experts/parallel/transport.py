"""Transport of tokens to experts that other devices keep (dispatch), and of results back (combine).

Inside of ``jax.shard_map`` every device has T tokens of its own and E / n of the experts, n being
the size of the ``expert`` axis.  A transport brings S tokens to each device, of which it computes
the part that its experts contribute, and adds up the parts of its own tokens.

Axis legend: T tokens of this device, S tokens that arrive, n devices, D model width.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.rows import Slots
from dynmoe_jax.mesh.axes import EXPERT

Compute = Callable[[Float[Array, "S D"], Slots], tuple[Float[Array, "S D"], Int[Array, ""]]]
"""(x_SD, slots among the experts of this device) -> (their part of y_SD, rows dropped)."""


class Transport(Protocol):
    """Computes y_TD of a device's own tokens with the experts of all devices."""

    def __call__(
        self, x_TD: Float[Array, "T D"], slots: Slots, compute: Compute
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        """Returns y_TD, and the rows that were dropped on this device."""


ARRIVED = "arrived"
"""Name, for ``jax.checkpoint``, of tokens that have travelled: worth keeping."""


def ring(x_TD, slots, compute):
    """Every token visits every device: two all-gathers of slots and one of tokens, then a
    reduce-scatter of results; backward mirrors them.

    (n - 1) T D values travel each way, whatever is chosen.  Only plain collectives, and only
    shapes that do not depend on the routing: nothing can overflow.
    """
    gather = partial(jax.lax.all_gather, axis_name=EXPERT, axis=0, tiled=True)
    everywhere = Slots(gather(slots.expert_TK), gather(slots.weight_TK), slots.num_experts)
    count = slots.num_experts // jax.lax.axis_size(EXPERT)
    mine = everywhere.among(jax.lax.axis_index(EXPERT) * count, count)
    x_SD = checkpoint_name(gather(x_TD), ARRIVED)
    y_SD, dropped = compute(x_SD, mine)
    return jax.lax.psum_scatter(y_SD, EXPERT, scatter_dimension=0, tiled=True), dropped
