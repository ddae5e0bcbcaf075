"""Next-token cross-entropy without holding the logits of a whole batch.

Gradients are computed where the loss is, since it is linear in its cotangent.  On TPU, kernels do
it, whose logits stay in VMEM (:mod:`.tpu`).  Elsewhere, and where a shape
does not fit them, logits are computed for a chunk of positions at a time, and the chunk's gradients
while they exist, so that no logit is ever computed twice or kept.

On a mesh all of it is one ``shard_map``: each device goes through the chunks of its own positions,
the ``model`` axis splits the vocabulary, and the gradient of the output projection is added up over
all chunks before it travels.

Axis legend: B batch, L positions, T = B L tokens, C positions of one chunk, N chunks, D model
width, V vocabulary.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.mesh.axes import (
    BATCH,
    MODEL,
    mesh_axes_at,
    mesh_sizes,
    on_one_device,
    parameter_spec,
)
from dynmoe_jax.mesh.collectives import each_device, gathered
from dynmoe_jax.model.kernels.cross_entropy.tpu import logit_gradients, logit_sums
from dynmoe_jax.model.kernels.cross_entropy.tpu_tiles import Tiles, cross_entropy_tiles
from dynmoe_jax.model.linear.products import contracted


def cross_entropy_sums(
    x_BLD: Float[Array, "B L D"],
    output_DV: Float[Array, "D V"],
    targets_BL: Int[Array, "B L"],
    weight_BL: Bool[Array, "B L"] | Float[Array, "B L"],
    *,
    z_weight: float = 0.0,
    chunk_tokens: int = 2048,
    plain: bool = False,
) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """Sum over positions of weight * (-log p(target) + z_weight * logsumexp(logits)^2).

    Args:
      x_BLD: the normed residual stream.
      output_DV: the output projection.
      targets_BL: the token that follows each position.
      weight_BL: what each position weighs; 0 or False: it may hold anything.  The kernels take
        bools alone; where weights are numbers, XLA computes the sums.
      z_weight: coefficient of the output z-loss (PaLM, arXiv 2204.02311, section 5).
      chunk_tokens: positions whose logits exist at one time on one device (at least one per
        sequence); the kernels take four times as many.
      plain: no kernels.

    Returns:
      the sum (differentiable, by float weights too), and the negative log-likelihood in nats of
      every position (0 where the weight is 0; no gradient: weigh positions instead).
    """
    if on_one_device():
        options = _Options(z_weight, chunk_tokens, plain=plain)
        return _local_sums(options, x_BLD, output_DV, targets_BL, weight_BL)
    spec = parameter_spec("output_DV", output_DV.shape, mesh_sizes())
    split = MODEL in mesh_axes_at(spec, 1)
    axis = MODEL if split else None
    options = _Options(z_weight, chunk_tokens, vocabulary_axis=axis, plain=plain)

    def on_each_device(x_BLD, output_DV, targets_BL, weight_BL):
        output_DV = gathered(output_DV, spec)
        total, nll_BL = _local_sums(options, x_BLD, output_DV, targets_BL, weight_BL)
        return jax.lax.psum(total, BATCH), nll_BL

    batch = P(BATCH)
    sums = each_device(on_each_device, (batch, spec, batch, batch), (P(), batch))
    return sums(x_BLD, output_DV, targets_BL, weight_BL)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Constants of all chunks.

    Attributes:
      z_weight: of the output z-loss.
      chunk_tokens: positions whose logits exist at one time.
      vocabulary_axis: the mesh axis that splits the vocabulary, if one does.
      tiles: of the kernels, if they run.
      plain: no kernels.
    """

    z_weight: float
    chunk_tokens: int
    vocabulary_axis: str | None = None
    tiles: Tiles | None = None
    plain: bool = False


def _local_sums(options, x_BLD, output_DV, targets_BL, weight_BL):
    tokens, (width, vocabulary) = targets_BL.size, output_DV.shape
    dtype, tiles = jnp.result_type(x_BLD, output_DV), None
    if weight_BL.dtype == bool and not options.plain:
        tiles = cross_entropy_tiles(tokens, width, vocabulary, options.chunk_tokens, dtype)
    local_sums = _sums_of_tokens if tiles else _sums_of_sequences
    options = dataclasses.replace(options, tiles=tiles)
    total, nll_BL = local_sums(options, x_BLD, output_DV, targets_BL, weight_BL)
    return total, jax.lax.stop_gradient(nll_BL)


def _sums_of_tokens(options, x_BLD, output_DV, targets_BL, valid_BL):
    """Computes the sums by the kernels: sequences do not matter, the last tile is filled up."""
    missing = -targets_BL.size % options.tiles.chunk

    def flat(array_BL):
        array_T = array_BL.reshape(-1, *array_BL.shape[2:])
        return jnp.pad(array_T, [(0, missing)] + [(0, 0)] * (array_T.ndim - 1))

    arrays = flat(x_BLD), output_DV, flat(targets_BL), flat(valid_BL)
    total, nll_T = _kernel_sums(options, *arrays)
    return total, nll_T[: targets_BL.size].reshape(targets_BL.shape)


def _sums_of_sequences(options, x_BLD, output_DV, targets_BL, weight_BL):
    """Computes the sums by XLA, a chunk of each sequence at a time."""
    batch, length = targets_BL.shape
    chunks = -(-length // max(1, options.chunk_tokens // batch))
    cut = partial(_cut, chunks=chunks, chunk_length=-(-length // chunks))
    weight_BL = weight_BL.astype(jnp.float32)
    total, nll_NBC = _chunked_sums(options, cut(x_BLD), output_DV, cut(targets_BL), cut(weight_BL))
    return total, jnp.moveaxis(nll_NBC, 0, 1).reshape(batch, -1)[:, :length]


def _cut(array_BL: Array, chunks: int, chunk_length: int) -> Array:
    """[B, L, ...] -> [chunks, B, C, ...], padded with zeros (positions that do not count)."""
    batch, length, *rest = array_BL.shape
    missing = chunks * chunk_length - length
    padded = jnp.pad(array_BL, [(0, 0), (0, missing)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(padded.reshape(batch, chunks, chunk_length, *rest), 1, 0)


def _chunk(options: _Options, output_DV, chunk):
    """(sum over the chunk, nll_BC), and what its gradients are made of: (x_BCD, dlogits_BCV,
    losses_BC)."""
    x_BCD, targets_BC, weight_BC = chunk
    valid_BC = weight_BC > 0
    axis = options.vocabulary_axis
    # Positions that do not count may hold anything, and 0 * NaN is NaN.
    x_BCD = jnp.where(valid_BC[..., None], x_BCD, 0)
    logits_BCV = contracted(x_BCD, output_DV, (2,), (0,), plain=options.plain)
    most_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
    if axis:
        most_BC1 = jax.lax.pmax(most_BC1, axis)
    sum_BC1 = jnp.sum(jnp.exp(logits_BCV - most_BC1), axis=-1, keepdims=True)
    if axis:
        sum_BC1 = jax.lax.psum(sum_BC1, axis)
        targets_BC = targets_BC - jax.lax.axis_index(axis) * logits_BCV.shape[-1]
    log_z_BC1 = most_BC1 + jnp.log(sum_BC1)
    hit_BCV = targets_BC[..., None] == jnp.arange(logits_BCV.shape[-1])
    target_BC = jnp.sum(jnp.where(hit_BCV, logits_BCV, 0), axis=-1)
    if axis:
        target_BC = jax.lax.psum(target_BC, axis)
    log_z_BC = log_z_BC1[..., 0]
    nll_BC = jnp.where(valid_BC, log_z_BC - target_BC, 0.0)
    z_BC = jnp.where(valid_BC, jnp.square(log_z_BC), 0.0)
    loss_BC = nll_BC + options.z_weight * z_BC
    value = jnp.sum(weight_BC * nll_BC) + options.z_weight * jnp.sum(weight_BC * z_BC)
    # d nll = softmax - hit, d logsumexp = softmax.
    scale_BC1 = 1 + 2 * options.z_weight * log_z_BC1
    dlogits_BCV = jnp.exp(logits_BCV - log_z_BC1) * scale_BC1 - hit_BCV
    dlogits_BCV = jnp.where(valid_BC[..., None], weight_BC[..., None] * dlogits_BCV, 0)
    return value, nll_BC, x_BCD, dlogits_BCV.astype(x_BCD.dtype), loss_BC


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_sums(options, x_NBCD, output_DV, targets_NBC, weight_NBC):
    def step(total, chunk):
        value, nll_BC, *_ = _chunk(options, output_DV, chunk)
        return total + value, nll_BC

    return jax.lax.scan(step, jnp.float32(0), (x_NBCD, targets_NBC, weight_NBC))


def _chunked_forward(options, x_NBCD, output_DV, targets_NBC, weight_NBC):
    product = partial(contracted, plain=options.plain)

    def step(carry, chunk):
        total, doutput_DV = carry
        value, nll_BC, x_BCD, dlogits_BCV, loss_BC = _chunk(options, output_DV, chunk)
        dx_BCD = product(dlogits_BCV, output_DV, (2,), (1,), x_BCD.dtype)
        doutput_DV += product(x_BCD, dlogits_BCV, (0, 1), (0, 1))
        return (total + value, doutput_DV), (nll_BC, dx_BCD, loss_BC)

    start = (jnp.float32(0), jnp.zeros(output_DV.shape, jnp.float32))
    chunks = (x_NBCD, targets_NBC, weight_NBC)
    (total, doutput_DV), (nll_NBC, dx_NBCD, loss_NBC) = jax.lax.scan(step, start, chunks)
    return (total, nll_NBC), (dx_NBCD, doutput_DV.astype(output_DV.dtype), loss_NBC)


def _cross_entropy_backward(options, gradients, cotangents):
    dx_NBCD, doutput_DV, loss_NBC = gradients
    scale = cotangents[0]
    dweight_NBC = None if loss_NBC is None else scale * loss_NBC
    if options.vocabulary_axis:
        # Every device has its share of the sum's cotangent, and the only piece of these logits.
        scale = scale * jax.lax.axis_size(options.vocabulary_axis)
    return (
        dx_NBCD * scale.astype(dx_NBCD.dtype),
        doutput_DV * scale.astype(doutput_DV.dtype),
        None,
        dweight_NBC,
    )


_chunked_sums.defvjp(_chunked_forward, _cross_entropy_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_sums(options, x_TD, output_DV, targets_T, valid_T):
    x_TD = jnp.where(valid_T[:, None], x_TD, 0)
    columns_T = _columns(options, output_DV, targets_T, valid_T)
    return _losses(options, logit_sums(options.tiles, x_TD, output_DV, columns_T), valid_T)[:2]


def _kernel_forward(options, x_TD, output_DV, targets_T, valid_T):
    # Positions that do not count may hold anything, and 0 * NaN is NaN.
    x_TD = jnp.where(valid_T[:, None], x_TD, 0)
    columns_T = _columns(options, output_DV, targets_T, valid_T)
    sums_3T = logit_sums(options.tiles, x_TD, output_DV, columns_T)
    total, nll_T, log_z_T = _losses(options, sums_3T, valid_T)
    scale_T = jnp.where(valid_T, 1 + 2 * options.z_weight * log_z_T, 0.0)
    dx_TD, doutput_DV = logit_gradients(options.tiles, x_TD, output_DV, columns_T, log_z_T, scale_T)
    return (total, nll_T), (dx_TD, doutput_DV.astype(output_DV.dtype), None)


def _columns(options, output_DV, targets_T, valid_T):
    """Columns of the targets on this device; -1 where it has none."""
    vocabulary = output_DV.shape[1]
    if options.vocabulary_axis:
        targets_T = targets_T - jax.lax.axis_index(options.vocabulary_axis) * vocabulary
    return jnp.where(valid_T & (targets_T >= 0) & (targets_T < vocabulary), targets_T, -1)


def _losses(options, sums_3T, valid_T):
    """(sum over the tokens, nll_T, log_z_T)."""
    most_T, sum_T, target_T = sums_3T
    if axis := options.vocabulary_axis:
        here_T, most_T = most_T, jax.lax.pmax(most_T, axis)
        sum_T, target_T = jax.lax.psum((sum_T * jnp.exp(here_T - most_T), target_T), axis)
    log_z_T = most_T + jnp.log(sum_T)
    nll_T = jnp.where(valid_T, log_z_T - target_T, 0.0)
    z_T = jnp.where(valid_T, jnp.square(log_z_T), 0.0)
    return jnp.sum(nll_T) + options.z_weight * jnp.sum(z_T), nll_T, log_z_T


_kernel_sums.defvjp(_kernel_forward, _cross_entropy_backward)
