"""Registry of routers: the one that settings name."""

from collections.abc import Callable

from dynmoe_jax import config
from dynmoe_jax.routing.record import Router
from dynmoe_jax.routing.top_k import TopK
from dynmoe_jax.routing.top_p import TopP

ROUTERS: dict[str, Callable[[config.MoE], Router]] = {
    "top_p": lambda moe: TopP(moe.num_experts, moe.top_p, moe.renormalize),
    "top_k": lambda moe: TopK(moe.num_experts, moe.top_k, moe.renormalize),
}
"""A new router adds its line here and its name to ``config.MoE.router``'s choices."""


def make_router(moe: config.MoE) -> Router:
    """The router that ``config.model.moe.router`` names."""
    return ROUTERS[moe.router](moe)
