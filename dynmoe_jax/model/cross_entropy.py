"""Next-token cross-entropy without holding the logits of a whole batch.

Logits are computed for a chunk of positions at a time.  Where gradients are wanted, a chunk's
gradients are computed while its logits exist (the loss is linear in its cotangent), so that no
logit is ever computed twice or kept.

Axis legend: B batch, L positions, C positions of one chunk, D model width, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
      chunk_tokens: positions whose logits exist at one time (at least one per sequence).

    Returns:
      the sum (differentiable), and the negative log-likelihood in nats of every position (0 where
      not valid; no gradient).
    """
    batch, length = targets_BL.shape
    # Cut along L, so that a batch that is sharded over devices stays where it is.
    chunks = -(-length // max(1, chunk_tokens // batch))
    chunk_length = -(-length // chunks)
    cut = partial(_cut, chunks=chunks, chunk_length=chunk_length)
    chunked = (cut(x_BLD), cut(targets_BL), cut(valid_BL))
    total, nll_NBC = _chunked_sums(z_weight, chunked[0], output_DV, *chunked[1:])
    nll_BL = jnp.moveaxis(nll_NBC, 0, 1).reshape(batch, -1)[:, :length]
    return total, jax.lax.stop_gradient(nll_BL)


def _cut(array_BL: Array, chunks: int, chunk_length: int) -> Array:
    """[B, L, ...] -> [chunks, B, C, ...], padded with zeros (positions that do not count)."""
    batch, length, *rest = array_BL.shape
    missing = chunks * chunk_length - length
    padded = jnp.pad(array_BL, [(0, 0), (0, missing)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(padded.reshape(batch, chunks, chunk_length, *rest), 1, 0)


def _chunk(z_weight, x_BCD, output_DV, targets_BC, valid_BC):
    """(sum over the chunk, nll_BC) from one chunk of positions."""
    # Positions that do not count may hold anything, and 0 * NaN is NaN.
    x_BCD = jnp.where(valid_BC[..., None], x_BCD, 0)
    logits_BCV = jnp.einsum("bcd,dv->bcv", x_BCD, output_DV, preferred_element_type=jnp.float32)
    log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    nll_BC = jnp.where(valid_BC, log_z_BC - target_BC, 0.0)
    z_BC = jnp.where(valid_BC, jnp.square(log_z_BC), 0.0)
    return jnp.sum(nll_BC) + z_weight * jnp.sum(z_BC), nll_BC


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_sums(z_weight, x_NBCD, output_DV, targets_NBC, valid_NBC):
    def step(total, chunk):
        x_BCD, targets_BC, valid_BC = chunk
        value, nll_BC = _chunk(z_weight, x_BCD, output_DV, targets_BC, valid_BC)
        return total + value, nll_BC

    return jax.lax.scan(step, jnp.float32(0), (x_NBCD, targets_NBC, valid_NBC))


def _forward(z_weight, x_NBCD, output_DV, targets_NBC, valid_NBC):
    gradient = jax.value_and_grad(_chunk, argnums=(1, 2), has_aux=True)

    def step(carry, chunk):
        total, doutput_DV = carry
        x_BCD, targets_BC, valid_BC = chunk
        (value, nll_BC), (dx_BCD, d_DV) = gradient(z_weight, x_BCD, output_DV, targets_BC, valid_BC)
        return (total + value, doutput_DV + d_DV), (nll_BC, dx_BCD)

    start = (jnp.float32(0), jnp.zeros(output_DV.shape, jnp.float32))
    chunks = (x_NBCD, targets_NBC, valid_NBC)
    (total, doutput_DV), (nll_NBC, dx_NBCD) = jax.lax.scan(step, start, chunks)
    return (total, nll_NBC), (dx_NBCD, doutput_DV.astype(output_DV.dtype))


def _backward(z_weight, gradients, cotangents):
    dx_NBCD, doutput_DV = gradients
    scale = cotangents[0]
    return (
        dx_NBCD * scale.astype(dx_NBCD.dtype),
        doutput_DV * scale.astype(doutput_DV.dtype),
        None,
        None,
    )


_chunked_sums.defvjp(_forward, _backward)
