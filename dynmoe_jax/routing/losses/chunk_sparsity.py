"""Chunk sparsity: few experts for many tokens (BlockFFN, arXiv 2507.08771, section 3.2).

Speculative decoding, and experts that lie in slow memory, pay for the experts that any token of a
chunk uses.

Axis legend: B sequences, C chunks of one, S tokens of a chunk, E experts.
"""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import RoutingLoss, controller_setting, weight_setting

_LEAST = 1e-6
"""Least probability that a token leaves an expert alone: the logarithm of 0 has no slope."""


@LOSSES.register("chunk_sparsity")
@dataclasses.dataclass(frozen=True)
class ChunkSparsity(RoutingLoss):
    """Expected share of experts that a chunk of tokens uses: mean_e (1 - prod_t (1 - q_te)).

    q are the gates over their sum.  Chunks end with their sequence, and count by their tokens.
    """

    weight: float = weight_setting(help="of the share of experts that a chunk of tokens uses")
    tokens: int = free_setting(64, "tokens of a chunk", unit="tokens", low=1)
    controller: str = controller_setting()
    needs = frozenset({"gates"})

    def sums(self, routing, given, params):
        """Shares of experts used, times the tokens of their chunk."""
        gate_TE = jnp.where(given.valid_T[:, None], routing.probs_TE, 0.0)
        total_T1 = jnp.sum(gate_TE, axis=-1, keepdims=True)
        q_TE = gate_TE / jnp.where(total_T1 > 0, total_T1, 1.0)
        left_TE = jnp.log(jnp.maximum(1 - q_TE, _LEAST))
        alone_BCE = jnp.exp(jnp.sum(self._in_chunks(left_TE, given), axis=2))
        valid_T1 = given.valid_T[:, None].astype(jnp.float32)
        tokens_BC = jnp.sum(self._in_chunks(valid_T1, given), axis=(2, 3))
        return {"used": jnp.sum(tokens_BC * (1 - jnp.mean(alone_BCE, axis=-1)))}

    def value(self, sums, tokens):
        """The mean over chunks."""
        return sums["used"] / tokens

    def _in_chunks(self, x_TX, given):
        """[B, C, S, X], with zeros behind the last tokens of a sequence."""
        size = min(self.tokens, given.length)
        x_BLX = x_TX.reshape(-1, given.length, x_TX.shape[-1])
        x_BLX = jnp.pad(x_BLX, [(0, 0), (0, -given.length % size), (0, 0)])
        return x_BLX.reshape(x_BLX.shape[0], -1, size, x_TX.shape[-1])
