"""Common parts of all kernels that Pallas compiles by Triton, for NVIDIA GPUs."""

from typing import Any

import jax
from jax.experimental.pallas import triton as plgpu


def dot(a: jax.Array, b: jax.Array, **transposed: bool) -> jax.Array:
    """Product of two tiles in float32; of float32 operands exact, not of their first bits."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jax.numpy.float32 else None
    return plgpu.dot(a, b, precision=exact, **transposed)


def options(warps: int, stages: int, interpret: bool) -> dict[str, Any]:
    """``pallas_call`` options: warps (of 32 threads), pipeline stages, interpret mode."""
    return {
        "compiler_params": plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        "interpret": interpret,
    }
