"""The two compiled programs of :mod:`.tree_writing`: read trees of prompts, and write behind them.

A sequence that is written sees the keys and values of its prompt's path, which stay where they are,
and those of its own tokens.

Axis legend: B rows, L tokens of a row, Q sequences of a row, M tokens that may be written, D model
width, H query heads, G key/value heads, R = H/G, W head width, V vocabulary, N MoE layers.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from dynmoe_jax.evaluation.scoring.tree_attention import tree_attention
from dynmoe_jax.model import Decoder
from dynmoe_jax.model.kv_cache import apply_layers, stacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Writing:
    """A batch in the middle of being written.

    Attributes:
      kept: keys and values of the tokens written, [B, Q, M, G, W], nested as the layers are.
      tokens_BQM: those drawn.
      drawn: how many of each sequence.
      active_BQ: which have not ended.
      experts_MNBQ: experts that each token used, once it was read.
    """

    kept: Any
    tokens_BQM: Int[Array, "B Q M"]
    drawn: Int[Array, ""]
    active_BQ: Bool[Array, "B Q"]
    experts_MNBQ: Int[Array, "M N B Q"]


@partial(jax.jit, static_argnames=("structure", "room"))
def begin(
    structure,
    params,
    tokens_BL,
    segment_ids_BL,
    positions_BL,
    ends_BL,
    leaves_BQ,
    active_BQ,
    vocab_size,
    *,
    room: int,
):
    """Reads the prompts and draws one token of each.

    Args:
      structure: of a decoder.
      params: its parameters.
      tokens_BL: trees of prompts, see :class:`dynmoe_jax.evaluation.scoring.batches.Batch`.
      segment_ids_BL: 0 for padding.
      positions_BL: of each token in its prompt.
      ends_BL: one past the last token below each.
      leaves_BQ: the last token of each prompt, in its row.
      active_BQ: False where a row has fewer prompts.
      vocab_size: of the tokenizer.
      room: M.

    Returns:
      keys and values of the prompts, nested as the layers are; the texts; experts [N, B L] that
      each prompt token used.
    """
    decoder = nnx.merge(structure, params)

    def attend(_, kept, query_BLHW, key_BLGW, value_BLGW):
        del kept
        mixed_BLHW = tree_attention(query_BLHW, key_BLGW, value_BLGW, ends_BL)
        return mixed_BLHW, (key_BLGW, value_BLGW)

    nothing = [[None for _ in stack.layers] for stack in decoder.stacks]
    x_BLD, rows, experts_NBL = apply_layers(
        decoder, stacked(decoder), tokens_BL, segment_ids_BL, positions_BL, nothing, attend
    )
    x_BQD = jnp.take_along_axis(x_BLD, leaves_BQ[..., None], axis=1)
    batch, sequences = leaves_BQ.shape

    def own(row_kept):  # [groups, B, L, G, W]
        shape = (row_kept.shape[0], batch, sequences, room, *row_kept.shape[-2:])
        return jnp.zeros(shape, row_kept.dtype)

    layers = experts_NBL.shape[0]
    writing = Writing(
        kept=jax.tree.map(own, rows),
        tokens_BQM=jnp.zeros((batch, sequences, room), jnp.int32),
        drawn=jnp.int32(0),
        active_BQ=active_BQ,
        experts_MNBQ=jnp.zeros((room, layers, batch, sequences), jnp.int16),
    )
    return (
        rows,
        _drawn(decoder, writing, x_BQD, vocab_size),
        experts_NBL.reshape(layers, tokens_BL.size),
    )


@partial(jax.jit, static_argnames="structure", donate_argnames="writing")
def write(
    structure, params, rows, writing, ends_BL, leaves_BQ, depths_BQ, vocab_size, until
) -> Writing:
    """Draws tokens until ``until`` have been drawn; no sequence is drawn that has ended.

    Args:
      structure: of a decoder.
      params: its parameters.
      rows: from :func:`begin`.
      writing: from :func:`begin` or here; given up.
      ends_BL: as in :func:`begin`.
      leaves_BQ: as in :func:`begin`.
      depths_BQ: their positions.
      vocab_size: of the tokenizer.
      until: at most M.
    """
    decoder = nnx.merge(structure, params)
    node_L = jnp.arange(ends_BL.shape[1])
    leaf_BQ1 = leaves_BQ[..., None]
    sees_BQL = (node_L <= leaf_BQ1) & (leaf_BQ1 < ends_BL[:, None, :])

    def one_token(writing: Writing) -> Writing:
        last = writing.drawn - 1
        token_BQ = jax.lax.dynamic_index_in_dim(writing.tokens_BQM, last, 2, keepdims=False)

        def attend(_, kept, query_BQHW, *new):
            row, own = kept
            own = tuple(
                jax.lax.dynamic_update_index_in_dim(old, fresh.astype(old.dtype), last, 2)
                for old, fresh in zip(own, new, strict=True)
            )
            return _attend(query_BQHW, row, own, sees_BQL, last), own

        x_BQD, kept, experts_NBQ = apply_layers(
            decoder,
            stacked(decoder),
            token_BQ,
            writing.active_BQ.astype(jnp.int32),
            depths_BQ + writing.drawn,
            _paired(rows, writing.kept),
            attend,
        )
        experts_MNBQ = writing.experts_MNBQ.at[last].set(experts_NBQ.astype(jnp.int16))
        writing = dataclasses.replace(writing, kept=kept, experts_MNBQ=experts_MNBQ)
        return _drawn(decoder, writing, x_BQD, vocab_size)

    def more(writing: Writing):
        return (writing.drawn < until) & jnp.any(writing.active_BQ)

    return jax.lax.while_loop(more, one_token, writing)


def _paired(rows, own):
    """Pairs, layer by layer, what was kept of the prompts with what is kept of the written
    texts."""
    return [
        list(zip(row_layers, own_layers, strict=True))
        for row_layers, own_layers in zip(rows, own, strict=True)
    ]


def _drawn(decoder: Decoder, writing: Writing, x_BQD, vocab_size) -> Writing:
    """One token further: the likeliest of those that the tokenizer knows."""
    logits_BQV = decoder.logits(x_BQD)
    known_V = jnp.arange(logits_BQV.shape[-1]) < vocab_size
    token_BQ = jnp.argmax(jnp.where(known_V, logits_BQV, -jnp.inf), axis=-1)
    tokens_BQM = jax.lax.dynamic_update_index_in_dim(
        writing.tokens_BQM, token_BQ.astype(jnp.int32), writing.drawn, 2
    )
    return dataclasses.replace(writing, tokens_BQM=tokens_BQM, drawn=writing.drawn + 1)


def _attend(query_BQHW, row, own, sees_BQL, last):
    """Attention to the path of a prompt and to what was written behind it; scores are float32."""
    (key_BLGW, value_BLGW), (key_BQMGW, value_BQMGW) = row, own
    batch, sequences, heads, width = query_BQHW.shape
    groups = key_BLGW.shape[2]
    query_BQGRW = query_BQHW.reshape(batch, sequences, groups, heads // groups, width) * width**-0.5
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    row_BQGRL = product("bqgrw,blgw->bqgrl", query_BQGRW, key_BLGW)
    own_BQGRM = product("bqgrw,bqmgw->bqgrm", query_BQGRW, key_BQMGW)
    row_BQGRL = jnp.where(sees_BQL[:, :, None, None], row_BQGRL, -jnp.inf)
    own_BQGRM = jnp.where(jnp.arange(own_BQGRM.shape[-1]) <= last, own_BQGRM, -jnp.inf)
    probs = jax.nn.softmax(jnp.concatenate([row_BQGRL, own_BQGRM], axis=-1))
    probs_BQGRL, probs_BQGRM = jnp.split(
        probs.astype(value_BLGW.dtype), [row_BQGRL.shape[-1]], axis=-1
    )
    mixed_BQGRW = product("bqgrl,blgw->bqgrw", probs_BQGRL, value_BLGW)
    mixed_BQGRW += product("bqgrm,bqmgw->bqgrw", probs_BQGRM, value_BQMGW)
    return mixed_BQGRW.reshape(query_BQHW.shape).astype(query_BQHW.dtype)
