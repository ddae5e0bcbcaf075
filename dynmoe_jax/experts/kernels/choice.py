"""Choice of the grouped matmul: which implementation computes the experts' products.

Axis legend: R rows, E experts, D model width, F hidden width of an expert.
"""

import functools
import importlib.util

import jax.numpy as jnp

from dynmoe_jax.experts.kernels.contract import XLA, GroupedProducts
from dynmoe_jax.experts.kernels.gpu.tiling import WIDTH_MULTIPLE
from dynmoe_jax.experts.kernels.gpu.tokamax import tokamax_products
from dynmoe_jax.experts.kernels.tpu.gmm import megablox_products
from dynmoe_jax.hardware.chips import chip_of
from dynmoe_jax.hardware.choice import check, choose, not_installed, platform_obstacle
from dynmoe_jax.hardware.native import library
from dynmoe_jax.hardware.target import Target
from dynmoe_jax.hardware.vmem import vmem_bytes

SETTING = "config.model.moe.grouped_product"
MODULES = {
    "megablox": "jax.experimental.pallas.ops.tpu.megablox.gmm",
    "tokamax": "tokamax",
    "triton": "jax.experimental.pallas.triton",
}
PLATFORMS = {
    "native": ("cpu",),
    "megablox": ("tpu",),
    "tokamax": ("gpu", "tpu"),
    "triton": ("gpu",),
}
OTHER_FLOPS_PER_BYTE = 240.0
"""FLOPs per byte assumed for TPUs that are not in the table: v5e's, the median."""

LEAST_COMPUTE_CAPABILITY = 8.0
"""Lowest compute capability that Pallas compiles for: Ampere."""


@functools.cache
def available_for(platform: str) -> frozenset[str]:
    """Names of the implementations that are installed here, for a platform."""
    found = {name for name, module in MODULES.items() if _exists(module)}
    if platform == "cpu" and library.available():
        found.add("native")
    return frozenset(found)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent is missing
        return False


def choose_products(
    requested: str,
    target: Target,
    available: frozenset[str],
    dtype: jnp.dtype,
    width: int,
    hidden_width: int,
) -> str:
    """Returns the name of the implementation that computes the experts' grouped matmul.

    One of ``"native"``, ``"blocks"``, ``"megablox"``, ``"triton"``, ``"tokamax"`` and ``"xla"``:
    the one requested, or for ``"auto"``:

    1. CPU: ``native``, kernels of our own (:mod:`.cpu.native`), where a C++ compiler is installed
       and the rows are float32.  Otherwise ``blocks``, a loop over the blocks of rows used.
       ``lax.ragged_dot`` is dense over the experts there, and many times slower
       (docs/measurements.md: cpu-ragged-dot).
    2. TPU: ``megablox``.  Its three kernels visit used rows alone.  XLA's forward and input
       gradient do so too, but its weight gradient is dense with the compiler of jax 0.10, not with
       that of jax 0.12, and its tile for the input gradient is so narrow that each row is read
       several times (docs/measurements.md: v5p-weight-gradient, v5p-input-gradient-tile).
       tokamax has the same kernels, but shapes outside its table of tuned tiles, the paper's among
       them, get tiles of 128 x 128 x 128.  Not measured: there was no TPU.  With it go kernels of
       our own that fuse gate, up and SwiGLU, where D and F are multiples of 128 and a tile of whole
       rows fits into VMEM (:mod:`.tpu.swiglu_tiling`).
       Types other than bfloat16 and float32, which Megablox does not know: ``xla``.
    3. NVIDIA GPU from Ampere on, numbers of 16 bits, widths that are multiples of 128:
       ``triton``, kernels of our own (:mod:`.gpu.gmm`), also fused with SwiGLU.  XLA's
       lowering is dense: in jaxlib 0.10.1 and 0.10.2 forward as well (docs/measurements.md:
       b200-ragged-dot), and the weight gradient by design
       (openxla/xla#40189; by jax 0.12 still, compiled for H100).  JAX's own Triton lowering is in
       no wheel from 0.10.0 to 0.11.2 (jax-ml/jax#40888).  tokamax's kernels leave gate and up to
       passes of their own and transpose weights.  Not measured: there was no GPU.
    4. The same in float32, tokamax installed: ``tokamax``.
    5. Any other GPU: ``blocks``, because it is never dense.  Not measured there.

    Args:
      requested: ``config.model.moe.grouped_product``.
      target: what the program will run on.
      available: implementations that can be had, see :func:`available_for`.
      dtype: of the rows.
      width: D.
      hidden_width: F.

    Raises:
      ConfigError: what was asked for does not exist here, or does not run there.
    """
    dtype = jnp.dtype(dtype)

    def obstacle(name: str) -> str:
        return _platform_obstacle(name, target, available) or _number_obstacle(
            name, dtype, width, hidden_width
        )

    return choose(SETTING, requested, _candidates(target, dtype, width, hidden_width), obstacle)


def _candidates(target: Target, dtype: jnp.dtype, width: int, hidden_width: int) -> tuple[str, ...]:
    """Implementations worth having, best first; the last one runs anywhere."""
    if target.platform == "cpu":
        return "native", "blocks"
    if target.platform == "tpu":
        return ("megablox", "xla") if dtype in (jnp.bfloat16, jnp.float32) else ("xla",)
    if _uneven(width, hidden_width) or target.compute_capability < LEAST_COMPUTE_CAPABILITY:
        return ("blocks",)
    return "triton", "tokamax", "blocks"


def check_request(requested: str, target: Target, available: frozenset[str]) -> None:
    """Raises ConfigError, in one sentence, unless ``requested`` can run on ``target``."""
    check(SETTING, requested, _platform_obstacle(requested, target, available))


def _platform_obstacle(name: str, target: Target, available: frozenset[str]) -> str:
    """Obstacle on this machine, whatever is computed."""
    if found := platform_obstacle(PLATFORMS.get(name, ()), target):
        return found
    if name not in PLATFORMS or name in available:
        return ""
    if name == "native":
        return f"cannot be had here: {library.why_not()}"
    return not_installed("install it (pip install tokamax)" if name == "tokamax" else "update JAX")


def _number_obstacle(name: str, dtype: jnp.dtype, width: int, hidden_width: int) -> str:
    """Obstacle that kernels of our own do not know such numbers or widths."""
    if name == "native" and dtype != jnp.float32:
        return f"computes in float32, not in {dtype.name}; set config.model.dtype='float32' or"
    if name == "triton" and dtype.itemsize != 2:
        return f"computes in bfloat16, not in {dtype.name}; set config.model.dtype='bfloat16' or"
    if name == "triton" and (uneven := _uneven(width, hidden_width)):
        return (
            f"needs widths that are multiples of {WIDTH_MULTIPLE}, and one is {uneven}; change it "
            "or"
        )
    return ""


def _uneven(*widths: int) -> int | None:
    """A width that is no multiple of 128."""
    return next((width for width in widths if width % WIDTH_MULTIPLE), None)


def make_products(name: str, target: Target) -> GroupedProducts:
    """Makes the grouped matmuls of an implementation other than ``native`` and ``blocks``."""
    if name == "megablox":
        return megablox_products(flops_per_byte(target), vmem_bytes(target))
    if name == "triton":
        # Not installed everywhere, and JAX says that it will go.
        from dynmoe_jax.experts.kernels.gpu.gmm import triton_products

        return triton_products(target.shared_bytes)
    if name == "tokamax":
        return tokamax_products(target.platform)
    return {"xla": XLA}[name]


def flops_per_byte(target: Target) -> float:
    """Peak rate of a TPU over that of its memory, from the data sheets in
    :mod:`dynmoe_jax.hardware.chips`."""
    chip = chip_of(target.kind)
    return chip.flops_per_s / chip.bytes_per_s if chip else OTHER_FLOPS_PER_BYTE
