"""Compiled programs of generation by an ensemble: each member has a KV cache of its own, tokens are
drawn from their mixture.

Axis legend: J members, B prompts, P slots of the prompts, S sequences, M tokens to draw at most, N
MoE layers of all members, V vocabulary that all members have.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dynmoe_jax.inference.decoding import (
    DecodeState,
    compute_token,
    drawn,
    drawn_until,
    newest_token,
    next_logits,
)
from dynmoe_jax.inference.ensemble.posterior import log_posterior, mixture
from dynmoe_jax.inference.sampling import Draw
from dynmoe_jax.model import Decoder
from dynmoe_jax.model.kernels.cross_entropy.chunked import cross_entropy_sums
from dynmoe_jax.model.kv_cache import (
    prefill,
    repeated,
    stacked,
    unstacked_cache,
    with_room,
)

_CHUNK_TOKENS = 512
"""Tokens of prompts whose logits exist at one time."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weighing:
    """The way members are weighed; data, so that one program fits all.

    Attributes:
      log_prior_J: logarithm of the prior.
      top_k: members that keep their weight; static.
    """

    log_prior_J: Float[Array, "J"]
    top_k: int = dataclasses.field(default=0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnsembleState(DecodeState):
    """S sequences in the middle of being decoded; ``cache`` is a tuple, of each member's.

    Attributes:
      loglik_JS: log-likelihood of each text under each member, but for its newest token.
      log_probs_JSV: of the newest token, drawn already, under each member.
    """

    loglik_JS: Float[Array, "J S"]
    log_probs_JSV: Float[Array, "J S V"]


@partial(jax.jit, static_argnames=("structure", "room", "samples", "in_scan"))
def prefill_ensemble(
    structure: tuple[nnx.GraphDef, ...],
    params: tuple[nnx.State, ...],
    tokens_BP: Int[Array, "B P"],
    start_B: Int[Array, "B"],
    limit_S: Int[Array, "S"],
    key_S: PRNGKeyArray,
    draw: Draw,
    weighing: Weighing,
    *,
    room: int,
    samples: int = 1,
    in_scan: bool = False,
) -> EnsembleState:
    """Reads prompts with every member and draws the first token of each sequence.

    Arguments as of :func:`dynmoe_jax.inference.decoding.prefill_prompts`, structure and parameters
    those of all members.
    """
    decoders = [nnx.merge(*pair) for pair in zip(structure, params, strict=True)]
    again = partial(jnp.repeat, repeats=samples, axis=0)
    caches, logliks, logits, experts = [], [], [], []
    for decoder in decoders:
        x_BPD, cache, experts_NBP = prefill(decoder, tokens_BP, start_B)
        logliks.append(again(_loglik_of_prompts(decoder, x_BPD, tokens_BP, start_B)))
        cache = with_room(repeated(cache, samples), tokens_BP.shape[1] + room)
        caches.append(cache if in_scan else unstacked_cache(cache))
        logits.append(next_logits(decoder, again(x_BPD[:, -1])))
        experts.append(again(experts_NBP[:, :, -1].T))
    experts_SN = jnp.concatenate(experts, axis=1)
    sequences, layers = experts_SN.shape
    log_probs_JSV = _log_probs(logits)
    state = EnsembleState(
        tuple(caches),
        jnp.int32(0),
        again(start_B) < tokens_BP.shape[1],
        limit_S,
        jnp.zeros((sequences, room), jnp.int32),
        jnp.zeros((sequences, room, layers), jnp.int32),
        key_S,
        jnp.zeros((sequences, room, len(decoders)), jnp.float32),
        jnp.stack(logliks),
        log_probs_JSV,
    )
    return _drawn_of_mixture(state, experts_SN, draw, weighing)


@partial(jax.jit, static_argnames="structure", donate_argnames="state")
def decode_ensemble(
    structure: tuple[nnx.GraphDef, ...],
    params: tuple[nnx.State, ...],
    layers: tuple | None,
    state: EnsembleState,
    draw: Draw,
    weighing: Weighing,
    until: Int[Array, ""],
) -> EnsembleState:
    """Draws tokens until ``until`` have been drawn or every sequence has ended.

    Arguments as of :func:`dynmoe_jax.inference.decoding.decode`, those of models of all members.
    """
    decoders = [nnx.merge(*pair) for pair in zip(structure, params, strict=True)]
    stacks = [stacked(decoder) for decoder in decoders] if layers is None else layers

    def one_token(state: EnsembleState) -> EnsembleState:
        token_S = newest_token(state)
        said_JS = jnp.take_along_axis(state.log_probs_JSV, token_S[None, :, None], axis=2)[..., 0]
        computed = [
            compute_token(decoder, own, token_S, state.active_S, cache)
            for decoder, own, cache in zip(decoders, stacks, state.cache, strict=True)
        ]
        logits, caches, experts = zip(*computed, strict=True)
        state = dataclasses.replace(
            state,
            cache=caches,
            loglik_JS=state.loglik_JS + said_JS,
            log_probs_JSV=_log_probs(logits),
        )
        return _drawn_of_mixture(state, jnp.concatenate(experts, axis=1), draw, weighing)

    return drawn_until(until, one_token, state)


def _drawn_of_mixture(state: EnsembleState, experts_SN, draw, weighing) -> EnsembleState:
    """The state one token further, drawn from the members' mixture."""
    log_JS = log_posterior(state.loglik_JS, weighing.log_prior_J, weighing.top_k)
    posterior_SMJ = jax.lax.dynamic_update_slice_in_dim(
        state.posterior_SMJ, jnp.exp(log_JS).T[:, None], state.drawn, axis=1
    )
    log_SV = mixture(log_JS[..., None], state.log_probs_JSV)
    state = dataclasses.replace(state, posterior_SMJ=posterior_SMJ)
    return drawn(state, log_SV, experts_SN, draw)


def _loglik_of_prompts(decoder: Decoder, x_BPD, tokens_BP, start_B) -> Float[Array, "B"]:
    """Log-likelihood of the tokens of each prompt behind its first."""
    slot_P = jnp.arange(tokens_BP.shape[1])
    predicts_BP = (slot_P >= start_B[:, None]) & (slot_P < len(slot_P) - 1)
    _, nll_BP = cross_entropy_sums(
        x_BPD,
        decoder.output_DV,
        jnp.roll(tokens_BP, -1, axis=1),
        predicts_BP,
        chunk_tokens=_CHUNK_TOKENS,
        plain=decoder.config.plain,
    )
    return -jnp.sum(nll_BP, axis=1)


def _log_probs(logits: list[Float[Array, "S _"]]) -> Float[Array, "J S V"]:
    """Logarithms of the members' probabilities, of tokens that all of them have."""
    rows = min(logits_SV.shape[1] for logits_SV in logits)
    return jnp.stack([jax.nn.log_softmax(logits_SV)[:, :rows] for logits_SV in logits])
