"""Operations, one file each; importing the room registers them."""

from dynmoe_jax.surgery.operations import (
    average,
    fit_norms,
    fit_projections,
    fit_router,
    grow,
    mix,
    split,
    stack,
    upcycle,
)

__all__ = [
    "average",
    "fit_norms",
    "fit_projections",
    "fit_router",
    "grow",
    "mix",
    "split",
    "stack",
    "upcycle",
]
