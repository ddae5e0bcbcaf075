"""Routing of tokens to experts: pure functions of tokens and router logits.

Knows no transport, no mesh and no weights of experts.  Importing the room registers its kinds.
"""

from dynmoe_jax.routing import controllers, losses, regularizers, routers, transforms
from dynmoe_jax.routing.record import ExpertSlots, Routing, SoftSlots
from dynmoe_jax.routing.router import Bounds, Parameter, Router, RouterInput
from dynmoe_jax.routing.routers import TopK, TopP, top_p_slots

__all__ = [
    "Bounds",
    "ExpertSlots",
    "Parameter",
    "Router",
    "RouterInput",
    "Routing",
    "SoftSlots",
    "TopK",
    "TopP",
    "controllers",
    "losses",
    "regularizers",
    "routers",
    "top_p_slots",
    "transforms",
]
