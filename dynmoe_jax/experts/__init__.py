"""Given rows and weights, compute.  Knows no router.

Every backend has the signature of :data:`Backend` and is tested against :mod:`.reference`.
"""

from dynmoe_jax.experts.backend import (
    Backend,
    make_backend,
    no_kernels,
    reads_in_stack,
    saved_rows_per_token,
)
from dynmoe_jax.experts.kinds import ExpertKind
from dynmoe_jax.experts.parallel.choice import make_transport
from dynmoe_jax.experts.parallel.shard import apply_experts
from dynmoe_jax.experts.rows import Rows, rows_from_routing
from dynmoe_jax.experts.weights import ExpertWeights, StackedView, swiglu

__all__ = [
    "Backend",
    "ExpertKind",
    "ExpertWeights",
    "Rows",
    "StackedView",
    "apply_experts",
    "make_backend",
    "make_transport",
    "no_kernels",
    "reads_in_stack",
    "rows_from_routing",
    "saved_rows_per_token",
    "swiglu",
]
