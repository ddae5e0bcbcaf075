"""Routing of tokens to experts: pure functions of router logits.

Knows no transport, no mesh and no weights of experts.
"""

from dynmoe_jax.routing.record import Router, Routing
from dynmoe_jax.routing.registry import ROUTERS, make_router
from dynmoe_jax.routing.top_k import TopK
from dynmoe_jax.routing.top_p import TopP, top_p_slots

__all__ = ["ROUTERS", "Router", "Routing", "TopK", "TopP", "make_router", "top_p_slots"]
