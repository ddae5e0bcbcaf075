"""Causal attention within segments, by several implementations of one signature.

Axis legend: B batch, L positions, H query heads, G key/value heads, W head width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.experts.kernels.gpu.tokamax import load_tokamax

AttentionKernel = Callable[
    [Float[Array, "B L H W"], Float[Array, "B L G W"], Float[Array, "B L G W"], Int[Array, "B L"]],
    Float[Array, "B L H W"],
]
"""(query, key, value, segment ids) -> mixed values; each position attends to those of its own
segment up to itself, and H/G query heads share one key/value head."""

SPLASH_BLOCKS = (512, 256, 128)
"""Tiles of positions.  512 is what MaxText trains with (its defaults ``sa_block_*``)."""


def xla_attention(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL):
    """Plain XLA: the scores of all pairs of positions exist."""
    return jax.nn.dot_product_attention(
        query_BLHW,
        key_BLGW,
        value_BLGW,
        mask=_same_segment(segment_ids_BL),
        is_causal=True,
        implementation="xla",
    )


def cudnn_attention(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL):
    """cuDNN's flash attention.

    The segments reach it as a mask, which JAX makes an additive bias [B, 1, L, L] in the
    compute type: 2 B L^2 bytes for one layer at a time, where scores would take H times as many.
    (cuDNN knows packed sequences, but JAX offers them in private functions alone.)
    """
    return jax.nn.dot_product_attention(
        query_BLHW,
        key_BLGW,
        value_BLGW,
        mask=_same_segment(segment_ids_BL),
        is_causal=True,
        implementation="cudnn",
    )


TRITON_WIDTHS = (32, 64, 128)
"""Head widths that the kernels for GPU have tiles for."""

TRITON_POSITIONS = 128
"""Divisor that L must have: no tile is larger."""

LARGE_WIDTH_BYTES = 160 * 2**10
"""Shared memory that heads of 128 take, as an A100 and an H100 have it; smaller ones take half."""


def triton_attention(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL):
    """Kernels of our own for NVIDIA GPUs, :mod:`.triton`."""
    # Not before it is wanted: JAX says that what they are written in will go.
    from dynmoe_jax.model.kernels.attention import triton as kernels

    return kernels.triton_attention(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL)


def splash_attention(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL, *, interpret=False):
    """Splash attention, by JAX's kernels for TPU; ``interpret`` runs them on a CPU, for tests.

    Blocks above the diagonal are never computed, and nothing of size L^2 exists.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, width = query_BLHW.shape[1:]
    block = splash_block(length)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)

    def one(query_HLW, key_GLW, value_GLW, segment_ids_L):
        segments = splash.SegmentIds(segment_ids_L, segment_ids_L)
        return kernel(query_HLW, key_GLW, value_GLW, segment_ids=segments)

    heads_first = (jnp.swapaxes(x, 1, 2) for x in (query_BLHW * width**-0.5, key_BLGW, value_BLGW))
    return jnp.swapaxes(jax.vmap(one)(*heads_first, segment_ids_BL), 1, 2)


def splash_block(length: int) -> int | None:
    """Largest tile that divides L; None if none does."""
    return next((block for block in SPLASH_BLOCKS if length % block == 0), None)


def tokamax_attention(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL):
    """tokamax's flash attention; the segments are a boolean mask [B, 1, L, L]."""
    return load_tokamax().dot_product_attention(
        query_BLHW,
        key_BLGW,
        value_BLGW,
        mask=_same_segment(segment_ids_BL),
        is_causal=True,
        implementation=("mosaic", "triton"),
    )


def _same_segment(segment_ids_BL: Int[Array, "B L"]) -> Bool[Array, "B 1 L L"]:
    return (segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :])[:, None]
