"""Choice of the kernel that computes attention.

Axis legend: B batch, L positions, H query heads, G key/value heads, W head width,
X = H W and Y = G W heads side by side.
"""

import dataclasses
import functools
import importlib.util

import jax.numpy as jnp
from jaxtyping import Array

from dynmoe_jax import config
from dynmoe_jax.hardware.choice import check, choose, not_installed, platform_obstacle
from dynmoe_jax.hardware.native import library
from dynmoe_jax.hardware.target import Target
from dynmoe_jax.hardware.vmem import exceeds_default
from dynmoe_jax.model.kernels.attention.api import (
    LARGE_WIDTH_BYTES,
    SPLASH_BLOCKS,
    TRITON_POSITIONS,
    TRITON_WIDTHS,
    AttentionKernel,
    cudnn_attention,
    splash_attention,
    splash_block,
    tokamax_attention,
    triton_attention,
    xla_attention,
)
from dynmoe_jax.model.kernels.attention.flat import flat_heads_attention, flat_obstacle
from dynmoe_jax.model.kernels.attention.native import native_attention
from dynmoe_jax.model.kernels.attention.tiled import tiled_attention

SETTING = "config.model.attention"
KERNELS: dict[str, AttentionKernel] = {
    "xla": xla_attention,
    "native": native_attention,
    "tiled": tiled_attention,
    "triton": triton_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
    "flat": flat_heads_attention,
    "tokamax": tokamax_attention,
}
PLATFORMS = {
    "native": ("cpu",),
    "triton": ("gpu",),
    "cudnn": ("gpu",),
    "splash": ("tpu",),
    "flat": ("tpu",),
    "tokamax": ("gpu", "tpu"),
}
CANDIDATES = {
    "cpu": ("native", "tiled"),
    "gpu": ("triton", "cudnn", "xla"),
    "tpu": ("flat", "splash", "xla"),
}
"""Kernels that ``auto`` chooses among, best first; the last one takes any shape."""

HOPPER = 9.0
AMPERE = 8.0


PLAIN = "xla"


def attention_of(model: config.Model) -> str:
    """The request for a kernel: ``config.model.attention``, or plain JAX's."""
    return PLAIN if model.plain else model.attention


@dataclasses.dataclass(frozen=True)
class Attend:
    """Attention by what ``config.model.attention`` names; an :data:`AttentionKernel`.

    Attributes:
      requested: ``config.model.attention``.
      target: what the program will run on.
    """

    requested: str
    target: Target

    def __call__(self, query_BLHW, key_BLGW, value_BLGW, segment_ids_BL):
        """Mixed values [B, L, H, W].

        Raises:
          ConfigError: what is asked for does not run at this length or head width.
        """
        (_, length, heads, width), kv_heads = query_BLHW.shape, key_BLGW.shape[2]
        name = self._name(query_BLHW.dtype, length, width, heads, kv_heads)
        return KERNELS[name](query_BLHW, key_BLGW, value_BLGW, segment_ids_BL)

    def takes_flat(self, query_BLX: Array, key_BLY: Array, width: int) -> bool:
        """Whether heads may stay side by side, for :func:`flat_attention`.

        Raises:
          ConfigError: as above.
        """
        heads, kv_heads = query_BLX.shape[2] // width, key_BLY.shape[2] // width
        name = self._name(query_BLX.dtype, query_BLX.shape[1], width, heads, kv_heads)
        return name == "flat"

    def _name(self, *shape) -> str:
        return choose_attention(self.requested, self.target, *shape)


@functools.cache
def make_attention(requested: str, target: Target) -> Attend:
    """Attention by what ``config.model.attention`` names; the same object for the same arguments.

    Raises:
      ConfigError: what is asked for does not run on ``target`` (at once), or not at the length or
        heads that it is called with (when it is traced, before anything is compiled).
    """
    check(SETTING, requested, _platform_obstacle(requested, target))
    return Attend(requested, target)


def choose_attention(
    requested: str,
    target: Target,
    dtype: jnp.dtype,
    length: int,
    width: int,
    heads: int,
    kv_heads: int,
) -> str:
    """Returns the name of a kernel in ``KERNELS``: the one requested, or for ``"auto"``:

    1. TPU: ``flat``, where heads fill blocks of 128 lanes and sequences fit into VMEM
       (:func:`~.flat.flat_obstacle`): no head is cut out of the projections, which costs
       more than attention itself (docs/measurements.md: v5p-flat-attention).
       Otherwise ``splash``, if one of its tiles divides L.  It skips the blocks above the diagonal
       and never holds scores of all pairs; it is faster than the older flash attention
       (docs/measurements.md: maxtext-splash).
    2. NVIDIA GPU: ``triton``, kernels of our own, where they know type, width and length
       (:func:`_triton_obstacle`); otherwise ``cudnn``, where it does (:func:`_cudnn_obstacle`),
       whose segments are a mask of all pairs.  Not measured: there was no GPU.
    3. CPU: ``native``, kernels of our own, where a C++ compiler is installed and the type is
       float32; otherwise ``tiled``.  Both compute little more than the pairs that attend:
       ``tiled`` takes less than half the time of ``xla``, and ``native`` less than half of that
       (docs/measurements.md: cpu-attention-tiled, cpu-attention-native).
    4. Anything else: ``xla``, which takes any shape.

    Args:
      requested: ``config.model.attention``.
      target: what the program will run on.
      dtype: of queries, keys and values.
      length: L.
      width: W.
      heads: H, of one device.
      kv_heads: G, of one device.

    Raises:
      ConfigError: what was asked for cannot be.
    """
    dtype, shape = jnp.dtype(dtype), (length, width, heads, kv_heads)

    def obstacle(name: str) -> str:
        return _platform_obstacle(name, target) or _shape_obstacle(name, target, dtype, *shape)

    return choose(SETTING, requested, CANDIDATES.get(target.platform, ("xla",)), obstacle)


def _platform_obstacle(name: str, target: Target) -> str:
    """Obstacle on this machine, whatever is computed."""
    if found := platform_obstacle(PLATFORMS.get(name, ()), target):
        return found
    if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return not_installed("install it (pip install tokamax)")
    return ""


def _shape_obstacle(
    name: str, target: Target, dtype: jnp.dtype, length: int, width: int, heads: int, kv_heads: int
) -> str:
    """Obstacle that a kernel does not know such numbers, lengths or heads."""
    if name == "native":
        missing = _native_obstacle(target, dtype)
    elif name == "triton":
        missing = _triton_obstacle(target, dtype, length, width)
    elif name == "cudnn":
        missing = _cudnn_obstacle(target, dtype, length, width)
    elif name == "splash":
        missing = _splash_obstacle(length)
    elif name == "flat":
        missing = _flat_obstacle(target, dtype, length, width, heads, kv_heads)
    else:
        missing = ""
    return missing and f"needs {missing}"


def _native_obstacle(target: Target, dtype: jnp.dtype) -> str:
    if jnp.dtype(dtype) != jnp.float32:
        return f"config.model.dtype='float32', not {jnp.dtype(dtype).name}"
    missing = target.platform == "cpu" and not library.available()
    return f"compiled kernels ({library.why_not()})" if missing else ""


def _splash_obstacle(length: int) -> str:
    if splash_block(length):
        return ""
    return f"sequences of a multiple of {SPLASH_BLOCKS[-1]} positions, not {length}"


def _flat_obstacle(target: Target, dtype: jnp.dtype, length, width, heads, kv_heads) -> str:
    if not exceeds_default(target):
        return "a TPU whose fast memory holds whole sequences, v5 or later"
    return flat_obstacle(length, width, heads, kv_heads, dtype)


def _triton_obstacle(target: Target, dtype: jnp.dtype, length: int, width: int) -> str:
    if target.compute_capability < AMPERE:
        return "an NVIDIA GPU of compute capability 8.0 or more"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"config.model.dtype='bfloat16', not {jnp.dtype(dtype).name}"
    small = target.shared_bytes < LARGE_WIDTH_BYTES
    widths = TRITON_WIDTHS[:-1] if small else TRITON_WIDTHS
    if width not in widths:
        return f"a config.model.head_width of {', '.join(map(str, widths))} here, not {width}"
    if length % TRITON_POSITIONS:
        return f"sequences of a multiple of {TRITON_POSITIONS} positions, not {length}"
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "a version of JAX with Pallas for Triton"
    return ""


def _cudnn_obstacle(target: Target, dtype: jnp.dtype, length: int, width: int) -> str:
    """Requirement of JAX's check of cuDNN's flash attention that is not met; empty if all are."""
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
