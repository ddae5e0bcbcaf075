"""Next-token cross-entropy without holding the logits of a whole batch.

Logits are computed for a chunk of positions at a time.  Where gradients are wanted, a chunk's
gradients are computed while its logits exist (the loss is linear in its cotangent), so that no
logit is ever computed twice or kept.

On a mesh all of it is one ``shard_map``: each device goes through the chunks of its own positions,
the ``model`` axis splits the vocabulary, and the gradient of the output projection is added up over
all chunks before it travels.

Axis legend: B batch, L positions, C positions of one chunk, N chunks, D model width, V vocabulary.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.axes import BATCH, MODEL, mesh_axes_at, mesh_sizes, on_one_device, parameter_spec
from dynmoe_jax.collectives import each_device, gathered


def cross_entropy_sums(
    x_BLD: Float[Array, "B L D"],
    output_DV: Float[Array, "D V"],
    targets_BL: Int[Array, "B L"],
    valid_BL: Bool[Array, "B L"],
    *,
    z_weight: float = 0.0,
    chunk_tokens: int = 2048,
) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """Sum over valid positions of -log p(target) + z_weight * logsumexp(logits)^2.

    Args:
      x_BLD: the normed residual stream.
      output_DV: the output projection.
      targets_BL: the token that follows each position.
      valid_BL: positions that count.
      z_weight: coefficient of the output z-loss (PaLM, arXiv 2204.02311, section 5).
      chunk_tokens: positions whose logits exist at one time on one device (at least one per
        sequence).

    Returns:
      the sum (differentiable), and the negative log-likelihood in nats of every position (0 where
      not valid; no gradient).
    """
    if on_one_device():
        options = _Options(z_weight, chunk_tokens)
        return _local_sums(options, x_BLD, output_DV, targets_BL, valid_BL)
    spec = parameter_spec("output_DV", output_DV.shape, mesh_sizes())
    split = MODEL in mesh_axes_at(spec, 1)
    options = _Options(z_weight, chunk_tokens, vocabulary_axis=MODEL if split else None)

    def on_each_device(x_BLD, output_DV, targets_BL, valid_BL):
        output_DV = gathered(output_DV, spec)
        total, nll_BL = _local_sums(options, x_BLD, output_DV, targets_BL, valid_BL)
        return jax.lax.psum(total, BATCH), nll_BL

    batch = P(BATCH)
    sums = each_device(on_each_device, (batch, spec, batch, batch), (P(), batch))
    return sums(x_BLD, output_DV, targets_BL, valid_BL)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What does not change from chunk to chunk.

    Attributes:
      z_weight: of the output z-loss.
      chunk_tokens: positions whose logits exist at one time.
      vocabulary_axis: the mesh axis that splits the vocabulary, if one does.
    """

    z_weight: float
    chunk_tokens: int
    vocabulary_axis: str | None = None


def _local_sums(options, x_BLD, output_DV, targets_BL, valid_BL):
    batch, length = targets_BL.shape
    chunks = -(-length // max(1, options.chunk_tokens // batch))
    cut = partial(_cut, chunks=chunks, chunk_length=-(-length // chunks))
    total, nll_NBC = _chunked_sums(options, cut(x_BLD), output_DV, cut(targets_BL), cut(valid_BL))
    nll_BL = jnp.moveaxis(nll_NBC, 0, 1).reshape(batch, -1)[:, :length]
    return total, jax.lax.stop_gradient(nll_BL)


def _cut(array_BL: Array, chunks: int, chunk_length: int) -> Array:
    """[B, L, ...] -> [chunks, B, C, ...], padded with zeros (positions that do not count)."""
    batch, length, *rest = array_BL.shape
    missing = chunks * chunk_length - length
    padded = jnp.pad(array_BL, [(0, 0), (0, missing)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(padded.reshape(batch, chunks, chunk_length, *rest), 1, 0)


def _chunk(options: _Options, output_DV, chunk):
    """(sum over the chunk, nll_BC), and what its gradients are made of: (x_BCD, dlogits_BCV)."""
    x_BCD, targets_BC, valid_BC = chunk
    axis = options.vocabulary_axis
    # Positions that do not count may hold anything, and 0 * NaN is NaN.
    x_BCD = jnp.where(valid_BC[..., None], x_BCD, 0)
    logits_BCV = jnp.einsum("bcd,dv->bcv", x_BCD, output_DV, preferred_element_type=jnp.float32)
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
    value = jnp.sum(nll_BC) + options.z_weight * jnp.sum(z_BC)
    # d nll = softmax - hit, d logsumexp = softmax.
    scale_BC1 = 1 + 2 * options.z_weight * log_z_BC1
    dlogits_BCV = jnp.exp(logits_BCV - log_z_BC1) * scale_BC1 - hit_BCV
    dlogits_BCV = jnp.where(valid_BC[..., None], dlogits_BCV, 0).astype(x_BCD.dtype)
    return value, nll_BC, x_BCD, dlogits_BCV


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_sums(options, x_NBCD, output_DV, targets_NBC, valid_NBC):
    def step(total, chunk):
        value, nll_BC, _, _ = _chunk(options, output_DV, chunk)
        return total + value, nll_BC

    return jax.lax.scan(step, jnp.float32(0), (x_NBCD, targets_NBC, valid_NBC))


def _forward(options, x_NBCD, output_DV, targets_NBC, valid_NBC):
    def step(carry, chunk):
        total, doutput_DV = carry
        value, nll_BC, x_BCD, dlogits_BCV = _chunk(options, output_DV, chunk)
        dx_BCD = jnp.einsum("bcv,dv->bcd", dlogits_BCV, output_DV)
        doutput_DV += jnp.einsum(
            "bcd,bcv->dv", x_BCD, dlogits_BCV, preferred_element_type=jnp.float32
        )
        return (total + value, doutput_DV), (nll_BC, dx_BCD)

    start = (jnp.float32(0), jnp.zeros(output_DV.shape, jnp.float32))
    chunks = (x_NBCD, targets_NBC, valid_NBC)
    (total, doutput_DV), (nll_NBC, dx_NBCD) = jax.lax.scan(step, start, chunks)
    return (total, nll_NBC), (dx_NBCD, doutput_DV.astype(output_DV.dtype))


def _backward(options, gradients, cotangents):
    dx_NBCD, doutput_DV = gradients
    scale = cotangents[0]
    if options.vocabulary_axis:
        # Every device has its share of the sum's cotangent, and the only piece of these logits.
        scale = scale * jax.lax.axis_size(options.vocabulary_axis)
    return (
        dx_NBCD * scale.astype(dx_NBCD.dtype),
        doutput_DV * scale.astype(doutput_DV.dtype),
        None,
        None,
    )


_chunked_sums.defvjp(_forward, _backward)
