"""Kinds of experts, one file each; importing the room registers them."""

from dynmoe_jax.experts.kinds import gelu, reglu, relu, silu, squared_relu, swiglu
from dynmoe_jax.experts.kinds.kind import ExpertKind

__all__ = ["ExpertKind", "gelu", "reglu", "relu", "silu", "squared_relu", "swiglu"]
