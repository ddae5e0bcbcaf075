"""Compiled programs of generation: prefill, and decode steps until all sequences have ended.

Axis legend: B prompts (in a step: rows of the cache), P slots of the prompts, S sequences, C
sequences of a row, so that S = B C in a step, M tokens to draw at most, D model width, N MoE
layers, J members of an ensemble.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dynmoe_jax.inference.sampling import Draw, draw_tokens
from dynmoe_jax.model import Decoder
from dynmoe_jax.model.kv_cache import (
    Cache,
    decode_step,
    prefill,
    repeated,
    stacked,
    unstacked,
    unstacked_cache,
    with_room,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """S sequences in the middle of being decoded.

    Attributes:
      cache: keys and values of all positions but the newest token's.
      drawn: tokens drawn so far, the same number for all sequences.
      active_S: which sequences have not ended.
      limit_S: tokens that each sequence may have.
      tokens_SM: the tokens drawn; what stands behind the end of a sequence means nothing.
      experts_SMN: experts that each layer used at the position from which a token was predicted.
      key_S: of the draws; None where none is needed, see :meth:`.sampling.Draw.greedy`.
      posterior_SMJ: of the members of an ensemble before each token; of one model there are none.
    """

    cache: Cache
    drawn: Int[Array, ""]
    active_S: Bool[Array, "S"]
    limit_S: Int[Array, "S"]
    tokens_SM: Int[Array, "S M"]
    experts_SMN: Int[Array, "S M N"]
    key_S: PRNGKeyArray | None
    posterior_SMJ: Float[Array, "S M J"]


State = TypeVar("State", bound=DecodeState)


@partial(jax.jit, static_argnames="structure")
def split_layers(structure: nnx.GraphDef, params: nnx.State) -> list[tuple[nnx.State, ...]]:
    """The layers' parameters for :func:`decode`, by :func:`dynmoe_jax.model.kv_cache.unstacked`."""
    return unstacked(nnx.merge(structure, params))


@partial(jax.jit, static_argnames=("structure", "room", "samples", "in_scan"))
def prefill_prompts(
    structure: nnx.GraphDef,
    params: nnx.State,
    tokens_BP: Int[Array, "B P"],
    start_B: Int[Array, "B"],
    limit_S: Int[Array, "S"],
    key_S: PRNGKeyArray,
    draw: Draw,
    *,
    room: int,
    samples: int = 1,
    in_scan: bool = False,
) -> DecodeState:
    """Reads prompts and draws the first token of each sequence.

    Args:
      structure: of a decoder.
      params: its parameters.
      tokens_BP: prompts, filled up at the left.
      start_B: where they begin; P for a row without a prompt, whose sequences have ended.
      limit_S: tokens that each sequence may have, S = B times ``samples``.
      key_S: a key for each sequence.
      draw: how tokens are drawn.
      room: M.
      samples: sequences for each prompt, side by side in the result.
      in_scan: leave the layers of the cache stacked.
    """
    decoder = nnx.merge(structure, params)
    x_BPD, cache, experts_NBP = prefill(decoder, tokens_BP, start_B)
    cache = with_room(repeated(cache, samples), tokens_BP.shape[1] + room)
    again = partial(jnp.repeat, repeats=samples, axis=0)
    return first_draw(
        decoder,
        cache if in_scan else unstacked_cache(cache),
        again(x_BPD[:, -1]),
        again(experts_NBP[:, :, -1].T),
        cache.start_B < tokens_BP.shape[1],
        limit_S,
        key_S,
        draw,
        room,
    )


def first_draw(
    decoder: Decoder,
    cache: Cache,
    x_SD: Float[Array, "S D"],
    experts_SN: Int[Array, "S N"],
    active_S: Bool[Array, "S"],
    limit_S: Int[Array, "S"],
    key_S: PRNGKeyArray | None,
    draw: Draw,
    room: int,
) -> DecodeState:
    """The state after the first token of each sequence, by the last position of its prompt.

    Args:
      decoder: for the logits.
      cache: of the prompts.
      x_SD: the normed residual stream there.
      experts_SN: experts used there.
      active_S: False for a sequence without a prompt.
      limit_S: as in :class:`DecodeState`.
      key_S: as in :class:`DecodeState`.
      draw: how tokens are drawn.
      room: M.
    """
    sequences, layers = experts_SN.shape
    state = DecodeState(
        cache,
        jnp.int32(0),
        active_S,
        limit_S,
        jnp.zeros((sequences, room), jnp.int32),
        jnp.zeros((sequences, room, layers), jnp.int32),
        key_S,
        jnp.zeros((sequences, room, 0), jnp.float32),
    )
    return drawn(state, next_logits(decoder, x_SD), experts_SN, draw)


@partial(jax.jit, static_argnames="structure", donate_argnames="state")
def decode(
    structure: nnx.GraphDef,
    params: nnx.State,
    layers: list | None,
    state: DecodeState,
    draw: Draw,
    until: Int[Array, ""],
) -> DecodeState:
    """Draws tokens until ``until`` have been drawn or every sequence has ended.

    Args:
      structure: of a decoder.
      params: its parameters.
      layers: from :func:`split_layers`; None to use those in ``params``, in a scan.
      state: given up; its cache is nested as the layers are.
      draw: how tokens are drawn.
      until: at most M.
    """
    decoder = nnx.merge(structure, params)
    stacks = stacked(decoder) if layers is None else layers

    def one_token(state: DecodeState) -> DecodeState:
        token_S = newest_token(state)
        computed = compute_token(decoder, stacks, token_S, state.active_S, state.cache)
        logits_SV, cache, experts_SN = computed
        return drawn(dataclasses.replace(state, cache=cache), logits_SV, experts_SN, draw)

    return drawn_until(until, one_token, state)


def drawn_until(until: Int[Array, ""], one_token: Callable[[State], State], state: State) -> State:
    """The state after ``until`` tokens, or when every sequence has ended; by one more at a time."""

    def more(state: State):
        return (state.drawn < until) & jnp.any(state.active_S)

    return jax.lax.while_loop(more, one_token, state)


def newest_token(state: DecodeState) -> Int[Array, "S"]:
    """The token of each sequence that was drawn last."""
    index = state.drawn - 1
    return jax.lax.dynamic_index_in_dim(state.tokens_SM, index, axis=1, keepdims=False)


def compute_token(
    decoder: Decoder, stacks, token_S: Int[Array, "S"], active_S: Bool[Array, "S"], cache: Cache
) -> tuple[Float[Array, "S V"], Cache, Int[Array, "S N"]]:
    """Computes the newest token of each sequence.

    Args:
      decoder: the model.
      stacks: its layers' parameters.
      token_S: the tokens.
      active_S: which sequences have not ended.
      cache: of all that stands before.

    Returns:
      logits of the next tokens; the cache with one more; experts that were used.
    """
    shape = cache.step_shape
    tokens_BC, active_BC = token_S.reshape(shape), active_S.reshape(shape)
    x_BCD, cache, experts_NBC = decode_step(decoder, stacks, tokens_BC, active_BC, cache)
    x_SD = x_BCD.reshape(-1, x_BCD.shape[-1])
    experts_SN = experts_NBC.reshape(len(experts_NBC), active_BC.size).T
    return next_logits(decoder, x_SD), cache, experts_SN


def next_logits(decoder: Decoder, x_SD: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Logits of the next tokens, by the normed residual stream."""
    return decoder.logits(x_SD[:, None])[:, 0]


def drawn(
    state: State, logits_SV: Float[Array, "S V"], experts_SN: Int[Array, "S N"], draw: Draw
) -> State:
    """The state one token further, by what was computed at the newest position."""
    token_S = draw_tokens(logits_SV, draw, state.key_S, state.drawn)
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.drawn, axis=1)
    count = state.drawn + 1
    return dataclasses.replace(
        state,
        drawn=count,
        active_S=state.active_S & ~draw.stops(token_S) & (count < state.limit_S),
        tokens_SM=put(state.tokens_SM, token_S[:, None]),
        experts_SMN=put(state.experts_SMN, experts_SN[:, None]),
    )
