"""What all kernels that Pallas compiles by Triton, for NVIDIA GPUs, have in common."""

from typing import Any

import jax
from jax.experimental.pallas import triton as plgpu


def dot(a: jax.Array, b: jax.Array, **transposed: bool) -> jax.Array:
    """The product of two tiles, float32; of float32 exactly so, not of its first bits."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jax.numpy.float32 else None
    return plgpu.dot(a, b, precision=exact, **transposed)


def options(warps: int, stages: int, interpret: bool) -> dict[str, Any]:
    """Of a call: threads by 32, loads on their way at a time; whether a CPU runs it, for tests."""
    return {
        "compiler_params": plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        "interpret": interpret,
    }
