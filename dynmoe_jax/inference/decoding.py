"""The two compiled programs of generation: read the prompts, and write until all have ended.

Axis legend: B sequences, P slots of the prompts, M tokens to write at most, N MoE layers.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from dynmoe_jax.inference.sampling import Draw, draw_tokens
from dynmoe_jax.model import Decoder
from dynmoe_jax.model.kv_cache import (
    KVCache,
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
class Writing:
    """B sequences in the middle of being written.

    Attributes:
      cache: keys and values of all positions but the newest token's.
      drawn: tokens drawn so far, the same number for all sequences.
      active_B: which sequences have not ended.
      limit_B: tokens that each sequence may have.
      tokens_BM: the tokens drawn; what stands behind the end of a sequence means nothing.
      experts_BMN: experts that each layer used at the position from which a token was predicted.
      key_B: of the draws.
    """

    cache: KVCache
    drawn: Int[Array, ""]
    active_B: Bool[Array, "B"]
    limit_B: Int[Array, "B"]
    tokens_BM: Int[Array, "B M"]
    experts_BMN: Int[Array, "B M N"]
    key_B: PRNGKeyArray


@partial(jax.jit, static_argnames="structure")
def split_layers(structure: nnx.GraphDef, params: nnx.State) -> list[tuple[nnx.State, ...]]:
    """The layers' parameters for :func:`write`, see :func:`dynmoe_jax.model.kv_cache.unstacked`."""
    return unstacked(nnx.merge(structure, params))


@partial(jax.jit, static_argnames=("structure", "room", "samples", "in_scan"))
def begin(
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
) -> Writing:
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
      samples: sequences to write for each prompt, side by side in the result.
      in_scan: leave the layers of the cache stacked.
    """
    decoder = nnx.merge(structure, params)
    x_BPD, cache, experts_NBP = prefill(decoder, tokens_BP, start_B)
    logits_BV = decoder.logits(x_BPD[:, -1:])[:, 0]
    cache = with_room(repeated(cache, samples), tokens_BP.shape[1] + room)
    cache = cache if in_scan else unstacked_cache(cache)
    sequences = cache.start_B.shape[0]
    experts_BMN = jnp.zeros((sequences, room, experts_NBP.shape[0]), jnp.int32)
    writing = Writing(
        cache,
        jnp.int32(0),
        cache.start_B < tokens_BP.shape[1],
        limit_S,
        jnp.zeros((sequences, room), jnp.int32),
        experts_BMN,
        key_S,
    )
    again = partial(jnp.repeat, repeats=samples, axis=0)
    return _drawn(writing, again(logits_BV), again(experts_NBP[:, :, -1].T), draw)


@partial(jax.jit, static_argnames="structure", donate_argnames="writing")
def write(
    structure: nnx.GraphDef,
    params: nnx.State,
    layers: list | None,
    writing: Writing,
    draw: Draw,
    until: Int[Array, ""],
) -> Writing:
    """Draws tokens until ``until`` have been drawn or every sequence has ended.

    Args:
      structure: of a decoder.
      params: its parameters.
      layers: from :func:`split_layers`; None to use those in ``params``, in a scan.
      writing: from :func:`begin`, which tells whether the layers are in a scan; given up.
      draw: how tokens are drawn.
      until: at most M.
    """
    decoder = nnx.merge(structure, params)
    stacks = stacked(decoder) if layers is None else layers

    def more(writing: Writing):
        return (writing.drawn < until) & jnp.any(writing.active_B)

    def one_token(writing: Writing) -> Writing:
        return _one_token(decoder, stacks, writing, draw)

    return jax.lax.while_loop(more, one_token, writing)


def _one_token(decoder: Decoder, stacks, writing: Writing, draw: Draw) -> Writing:
    newest = partial(jax.lax.dynamic_slice_in_dim, start_index=writing.drawn - 1, slice_size=1)
    token_B1 = newest(writing.tokens_BM, axis=1)
    x_B1D, cache, experts_NB1 = decode_step(
        decoder, stacks, token_B1, writing.active_B[:, None], writing.cache
    )
    logits_BV = decoder.logits(x_B1D)[:, 0]
    writing = dataclasses.replace(writing, cache=cache)
    return _drawn(writing, logits_BV, experts_NB1[:, :, 0].T, draw)


def _drawn(writing: Writing, logits_BV, experts_BN, draw: Draw) -> Writing:
    """One token further, by these logits."""
    token_B = draw_tokens(logits_BV, draw, writing.key_B, writing.drawn)
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=writing.drawn, axis=1)
    drawn = writing.drawn + 1
    return dataclasses.replace(
        writing,
        drawn=drawn,
        active_B=writing.active_B & ~draw.stops(token_B) & (drawn < writing.limit_B),
        tokens_BM=put(writing.tokens_BM, token_B[:, None]),
        experts_BMN=put(writing.experts_BMN, experts_BN[:, None]),
    )
