"""Causal attention within segments on TPU, from projections to mixed values without a detour.

The projections of all heads stand side by side, [B, L, H*W], as a matrix product makes them.
Kernels that want heads apart, [B, H, L, W], cost a pass over memory for every array in and out, and
half of the lanes where W = 64.  Here a program takes a block of 128 lanes, one or two heads,
rotates queries and keys by their positions in VMEM, attends, and writes side by side again.
Backward adds up all gradients in VMEM, in one kernel.

Axis legend: B batch, L positions, H query heads, G key/value heads, W head width,
X = H W and Y = G W heads side by side, P lanes of a block.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dynmoe_jax.hardware.target import TPU_LANES
from dynmoe_jax.hardware.vmem import FLAT_ATTENTION_BUDGET
from dynmoe_jax.model.kernels.attention.flat_heads import Heads
from dynmoe_jax.model.kernels.attention.flat_kernels import SUM_ROWS, backward, forward

TILES = (512, 256, 128)
"""Positions of a tile, the largest that divides L; its scores are float32 (docs/measurements.md:
tpu-score-tile)."""


def flat_obstacle(length: int, width: int, heads: int, kv_heads: int, dtype: jnp.dtype) -> str:
    """Requirement of these kernels that is not met; empty if all are."""
    lanes = max(width, TPU_LANES)
    if lanes % TPU_LANES or lanes % width or width < TPU_LANES // 2:
        fits = f"{TPU_LANES // 2} or a multiple of {TPU_LANES}"
        return f"a config.model.head_width of {fits}, not {width}"
    if heads * width % lanes or kv_heads * width % lanes:
        count = f"{heads} and {kv_heads}"
        return f"heads that fill blocks of {TPU_LANES} lanes on each device, not {count}"
    if length % TILES[-1]:
        return f"sequences of a multiple of {TILES[-1]} positions, not {length}"
    if _vmem_of_backward(_heads(length, width, heads // kv_heads), dtype) > FLAT_ATTENTION_BUDGET:
        fits = f"{FLAT_ATTENTION_BUDGET} bytes of fast memory"
        return f"sequences that fit into {fits}, not {length} positions"
    return ""


def _vmem_of_backward(heads: Heads, dtype: jnp.dtype) -> int:
    """Bytes that backward uses; forward uses less."""
    one, wide = heads.length * heads.lanes, jnp.dtype(dtype).itemsize
    # Eight arrays in and out and the angles, of two programs at a time; queries, keys and dmixed of
    # each head; keys transposed; segments; three gradients; and some tiles of scores.
    moved = 2 * (8 * wide + 4) * one
    kept = (3 * heads.side_by_side + 1) * wide * one + 4 * heads.length * TPU_LANES + 3 * 4 * one
    return moved + kept + 8 * 4 * heads.tile**2


def flat_heads_attention(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL, *, interpret=False):
    """An ``AttentionKernel`` of heads that stand apart, and are rotated already."""
    flat = (x_BLHW.reshape(*x_BLHW.shape[:2], -1) for x_BLHW in (query_BLHW, key_BLGW, value_BLGW))
    width = query_BLHW.shape[3]
    mixed_BLX = flat_attention(*flat, segment_ids_BL, None, width, interpret)
    return mixed_BLX.reshape(query_BLHW.shape)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def flat_attention(
    query_BLX: Float[Array, "B L X"],
    key_BLY: Float[Array, "B L Y"],
    value_BLY: Float[Array, "B L Y"],
    segment_ids_BL: Int[Array, "B L"],
    rotary_BLP: Float[Array, "B L P"] | None,
    width: int,
    interpret: bool = False,
) -> Float[Array, "B L X"]:
    """Rotary positions and attention of heads side by side.

    Args:
      query_BLX: not yet rotated by their positions, nor scaled.
      key_BLY: H/G query heads share one key/value head.
      value_BLY: values.
      segment_ids_BL: a position attends to those of its own segment up to itself.
      rotary_BLP: :func:`~dynmoe_jax.model.rotary.rotary_table`; None: queries and keys are rotated
      already.
      width: W.
      interpret: runs the kernels on a CPU, for tests.
    """
    return _flat_attention_forward(
        query_BLX, key_BLY, value_BLY, segment_ids_BL, rotary_BLP, width, interpret
    )[0]


def _flat_attention_forward(
    query_BLX, key_BLY, value_BLY, segment_ids_BL, rotary_BLP, width, interpret
):
    B, L, X = query_BLX.shape
    heads = _heads(L, width, X // key_BLY.shape[2])
    P, side_by_side, dtype = heads.lanes, heads.side_by_side, query_BLX.dtype
    R = width + SUM_ROWS
    log_sum = jax.ShapeDtypeStruct((B, X // P, side_by_side, L), jnp.float32)
    queries, keys, log_sums = _blocks(heads)
    inputs = [query_BLX, key_BLY, value_BLY]
    mixed_BLX, log_sum_BXHL = _call(
        heads,
        forward,
        inputs,
        (segment_ids_BL, rotary_BLP),
        in_specs=[queries, keys, keys],
        out_specs=[queries, log_sums],
        out_shape=[jax.ShapeDtypeStruct((B, L, X), dtype), log_sum],
        scratch=[
            *[((side_by_side, P, L), dtype), ((side_by_side, L, P), dtype)],
            *[((side_by_side, R, L), dtype), ((side_by_side, heads.tile), jnp.float32)],
            ((side_by_side, R, heads.tile), jnp.float32),
        ],
        products=2,
        interpret=interpret,
    )
    residuals = (*inputs, segment_ids_BL, rotary_BLP, mixed_BLX, log_sum_BXHL)
    return mixed_BLX, residuals


def _flat_attention_backward(width, interpret, residuals, dmixed_BLX):
    query_BLX, key_BLY, value_BLY, segment_ids_BL, rotary_BLP, mixed_BLX, log_sum = residuals
    (_, L, X), dtype = query_BLX.shape, query_BLX.dtype
    heads = _heads(L, width, X // key_BLY.shape[2])
    P, side_by_side = heads.lanes, heads.side_by_side
    queries, keys, log_sums = _blocks(heads)
    gradients = _call(
        heads,
        backward,
        [query_BLX, key_BLY, value_BLY, mixed_BLX, log_sum, dmixed_BLX],
        (segment_ids_BL, rotary_BLP),
        in_specs=[queries, keys, keys, queries, log_sums, queries],
        out_specs=[queries, keys, keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query_BLX, key_BLY, value_BLY)],
        scratch=[
            *[((side_by_side, P, L), dtype), ((side_by_side, L, P), dtype), ((P, L), dtype)],
            *[((side_by_side, P, L), dtype), ((side_by_side, L), jnp.float32)],
            *[((P, L), jnp.float32)] * 3,
        ],
        products=5,
        interpret=interpret,
    )
    return *gradients, None, None


flat_attention.defvjp(_flat_attention_forward, _flat_attention_backward)


def _heads(length: int, width: int, shared: int) -> Heads:
    tile = next(tile for tile in TILES if length % tile == 0)
    return Heads(width, max(width, TPU_LANES), length, shared, tile)


def _blocks(heads: Heads) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Blocks of queries, of keys, and of what there is once for a query of a head.

    The grid is (sequence, block of key/value heads, block of query heads among those that share).
    """
    L, P = heads.length, heads.lanes
    queries = pl.BlockSpec((1, L, P), lambda b, g, h: (b, 0, g * heads.shared + h))
    keys = pl.BlockSpec((1, L, P), lambda b, g, h: (b, 0, g))
    log_sums = pl.BlockSpec(
        (1, 1, heads.side_by_side, L), lambda b, g, h: (b, g * heads.shared + h, 0, 0)
    )
    return queries, keys, log_sums


def _call(
    heads, body, inputs, shared, *, in_specs, out_specs, out_shape, scratch, products, interpret
):
    """Runs one of the bodies of :mod:`.flat_kernels`; ``shared`` is what all of them read."""
    segment_ids_BL, rotary_BLP = shared
    (B, L), (query, key) = segment_ids_BL.shape, inputs[:2]
    shared_inputs = [segment_bounds(segment_ids_BL, heads), segment_ids_BL[:, None]]
    shared_specs = [
        pl.BlockSpec(memory_space=pltpu.SMEM),
        pl.BlockSpec((1, 1, L), lambda b, g, h: (b, 0, 0)),
    ]
    if rotary_BLP is not None:
        shared_inputs.append(rotary_BLP)
        shared_specs.append(pl.BlockSpec((1, L, heads.lanes), lambda b, g, h: (b, 0, 0)))

    def kernel(bound_ref, segment_ref, *refs):
        body(heads, bound_ref, segment_ref, *(refs if rotary_BLP is not None else (None, *refs)))

    inputs = [*shared_inputs, *inputs]
    pairs = B * query.shape[2] // heads.width * heads.pairs
    return pl.pallas_call(
        kernel,
        grid=(B, key.shape[2] // heads.lanes, heads.shared),
        in_specs=[*shared_specs, *in_specs],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[
            pltpu.VMEM((L, TPU_LANES), jnp.int32),
            *(pltpu.VMEM(shape, dtype) for shape, dtype in scratch),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_of_backward(heads, query.dtype),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * heads.width,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *out_shape)),
        ),
        name=f"flat_attention_{body.__name__}",
        interpret=interpret,
    )(*inputs)


def segment_bounds(segment_ids_BL: Int[Array, "B L"], heads: Heads) -> Int[Array, "2 B tiles"]:
    """Lowest and highest segment id of each tile."""
    ids = segment_ids_BL.reshape(-1, heads.tiles, heads.tile)
    return jnp.stack([jnp.min(ids, axis=-1), jnp.max(ids, axis=-1)])
