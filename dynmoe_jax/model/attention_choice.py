"""Which implementation computes attention: one rule, written down.

Axis legend: L positions, W head width.
"""

import functools
import importlib.util

import jax.numpy as jnp

from dynmoe_jax import config
from dynmoe_jax.model.attention_kernels import (
    SPLASH_BLOCKS,
    AttentionKernel,
    cudnn_attention,
    splash_attention,
    splash_block,
    tokamax_attention,
    xla_attention,
)
from dynmoe_jax.model.attention_tiles import tiled_attention
from dynmoe_jax.target import Target

SETTING = "config.model.attention"
KERNELS: dict[str, AttentionKernel] = {
    "xla": xla_attention,
    "tiled": tiled_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
    "tokamax": tokamax_attention,
}
PLATFORMS = {"cudnn": ("gpu",), "splash": ("tpu",), "tokamax": ("gpu", "tpu")}
HOPPER = 9.0
AMPERE = 8.0


@functools.cache
def make_attention(requested: str, target: Target) -> AttentionKernel:
    """Attention by what ``config.model.attention`` names; the same object for the same arguments.

    Raises:
      ConfigError: what is asked for does not run on ``target`` (at once), or not at the length or
        head width that it is called with (when it is traced, before anything is compiled).
    """
    _check_platform(requested, target)

    def attend(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL):
        length, _, width = query_BLHW.shape[1:]
        name = choose_attention(requested, target, query_BLHW.dtype, length, width)
        return KERNELS[name](query_BLHW, key_BLGW, value_BLGW, segment_ids_BL)

    return attend


def choose_attention(
    requested: str, target: Target, dtype: jnp.dtype, length: int, width: int
) -> str:
    """The name of a kernel in ``KERNELS``.

    What was asked for, if anything; otherwise:

    1. TPU: ``splash``, if one of its tiles divides L.  It skips the blocks above the diagonal and
       never holds scores of all pairs; with it a step of MaxText took 4.45 s where the older flash
       attention took 5.95 (AI-Hypercomputer/torchprime#145).
    2. NVIDIA GPU: ``cudnn``, where it knows the type, width and length (:func:`_cudnn_obstacle`).
    3. CPU: ``tiled``, which computes little more than the pairs that attend.  Forward and backward
       of 8 sequences of 512 positions, 8 heads of 64, on two cores: 173 ms, against 394 ms.
    4. Anything else: ``xla``, which takes any shape.

    Args:
      requested: ``config.model.attention``.
      target: what the program will run on.
      dtype: of queries, keys and values.
      length: L.
      width: W.

    Raises:
      ConfigError: what was asked for cannot be.
    """
    obstacles = {
        "cudnn": _cudnn_obstacle(target, dtype, length, width),
        "splash": _splash_obstacle(length),
    }
    if requested != "auto":
        _check_platform(requested, target)
        if obstacles.get(requested):
            raise config.ConfigError(
                f"{SETTING}={requested!r} needs {obstacles[requested]}; use {SETTING}='auto'."
            )
        return requested
    if target.platform == "tpu":
        return "xla" if obstacles["splash"] else "splash"
    if target.platform == "gpu":
        return "xla" if obstacles["cudnn"] else "cudnn"
    return "tiled"


def _splash_obstacle(length: int) -> str:
    if splash_block(length):
        return ""
    return f"sequences of a multiple of {SPLASH_BLOCKS[-1]} positions, not {length}"


def _cudnn_obstacle(target: Target, dtype: jnp.dtype, length: int, width: int) -> str:
    """What JAX's check of cuDNN's flash attention asks for and is not given, if anything."""
    widest = 256 if target.compute_capability >= HOPPER else 128
    if target.compute_capability < AMPERE:
        return "an NVIDIA GPU of compute capability 8.0 or more"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"config.model.dtype='bfloat16', not {jnp.dtype(dtype).name}"
    if width % 8 or width > widest:
        return f"a config.model.head_width that is a multiple of 8 up to {widest}, not {width}"
    if length % 2:
        return f"sequences of an even number of positions, not {length}"
    return ""


def _check_platform(requested: str, target: Target) -> None:
    platforms = PLATFORMS.get(requested)
    if platforms and target.platform not in platforms:
        wanted = " or ".join(platform.upper() for platform in platforms)
        raise config.ConfigError(
            f"{SETTING}={requested!r} needs a {wanted}, and this is a {target.platform.upper()}; "
            f"use {SETTING}='auto'."
        )
    if requested == "tokamax" and importlib.util.find_spec("tokamax") is None:
        raise config.ConfigError(
            f"{SETTING}='tokamax' is not installed here; install it (pip install tokamax) or use "
            f"{SETTING}='auto'."
        )
