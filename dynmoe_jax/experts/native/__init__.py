"""Expert compute on CPU by kernels in C++, through XLA's foreign function interface."""

from dynmoe_jax.experts.native.backend import native_experts

__all__ = ["native_experts"]
