"""KV cache of trees of prompts, behind whose leaves texts are decoded, and their prefill.

A sequence that is decoded sees the keys and values of its prompt's path, which stay where they are,
and those of its own tokens.

Axis legend: B rows, L tokens of a row, Q sequences of a row, S = B Q, M tokens that may be drawn, D
model width, H query heads, G key/value heads, R = H/G, W head width, V vocabulary, N MoE layers.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.evaluation.scoring.tree_attention import tree_attention
from dynmoe_jax.inference.decoding import DecodeState, first_draw
from dynmoe_jax.inference.sampling import Draw
from dynmoe_jax.model.kv_cache import (
    Attend,
    LayerKV,
    RouterCaches,
    apply_layers,
    router_caches,
    stacked,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeKVCache:
    """Keys and values of trees of prompts, and of the tokens decoded behind their leaves.

    Attributes:
      prompts: of the prompts' tokens, [B, L, G, W].
      own: of the decoded tokens, [B, Q, M, G, W]; both nested as the layers are.
      routers: caches of the layers' routers; a router that keeps one has every prompt in a row of
        its own, so that Q is 1.
      count: decoded tokens of each sequence that are there.
      sees_BQL: the path of each sequence's prompt.
      depths_BQ: positions of the prompts' last tokens.
    """

    prompts: LayerKV
    own: LayerKV
    routers: RouterCaches
    count: Int[Array, ""]
    sees_BQL: Bool[Array, "B Q L"]
    depths_BQ: Int[Array, "B Q"]

    @property
    def step_shape(self) -> tuple[int, int]:
        """[B, Q]: the sequences of a row stand side by side."""
        return self.depths_BQ.shape

    @property
    def kv(self) -> LayerKV:
        """(those of the prompts, those of the decoded tokens) of each layer."""
        return [
            list(zip(prompts, own, strict=True))
            for prompts, own in zip(self.prompts, self.own, strict=True)
        ]

    def behind(self, count: int) -> tuple[Int[Array, "B Q"], Attend]:
        """(positions of the next token of each sequence, attention to its path and itself)."""
        del count  # Q: one of each sequence

        def attend(_, kv, query_BQHW, *new):
            prompts, own = kv
            own = tuple(
                jax.lax.dynamic_update_index_in_dim(old, fresh.astype(old.dtype), self.count, 2)
                for old, fresh in zip(own, new, strict=True)
            )
            return _attend(query_BQHW, prompts, own, self.sees_BQL, self.count), own

        return self.depths_BQ + self.count + 1, attend

    def filled(self, kv: LayerKV, routers: RouterCaches, count: int) -> "TreeKVCache":
        """The cache with one more token of each sequence."""
        del count
        return dataclasses.replace(self, own=kv, routers=routers, count=self.count + 1)


@partial(jax.jit, static_argnames=("structure", "room"))
def prefill_trees(
    structure: nnx.GraphDef,
    params: nnx.State,
    tokens_BL: Int[Array, "B L"],
    segment_ids_BL: Int[Array, "B L"],
    positions_BL: Int[Array, "B L"],
    ends_BL: Int[Array, "B L"],
    leaves_BQ: Int[Array, "B Q"],
    active_BQ: Bool[Array, "B Q"],
    draw: Draw,
    *,
    room: int,
) -> tuple[DecodeState, Int[Array, "N T"]]:
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
      draw: how tokens are drawn, without keys.
      room: M.

    Returns:
      the state for :func:`dynmoe_jax.inference.decoding.decode`; experts that each of the T = B L
      prompt tokens used.
    """
    decoder = nnx.merge(structure, params)

    def attend(_, kv, query_BLHW, key_BLGW, value_BLGW):
        del kv
        mixed_BLHW = tree_attention(query_BLHW, key_BLGW, value_BLGW, ends_BL)
        return mixed_BLHW, (key_BLGW, value_BLGW)

    nothing = [[None for _ in stack.layers] for stack in decoder.stacks]
    rows, length = tokens_BL.shape
    routers = router_caches(decoder, (rows, length + room))
    texts = tokens_BL, segment_ids_BL, positions_BL
    x_BLD, prompts, routers, experts_NBL = apply_layers(
        decoder, stacked(decoder), *texts, nothing, attend, routers
    )
    x_BQD = jnp.take_along_axis(x_BLD, leaves_BQ[..., None], axis=1)
    experts_NBQ = jnp.take_along_axis(experts_NBL, leaves_BQ[None], axis=2)
    layers, sequences = len(experts_NBQ), leaves_BQ.size
    state = first_draw(
        decoder,
        _cache(prompts, routers, ends_BL, leaves_BQ, positions_BL, room),
        x_BQD.reshape(sequences, -1),
        experts_NBQ.reshape(layers, sequences).T,
        active_BQ.reshape(sequences),
        jnp.full(sequences, room, jnp.int32),
        None,
        draw,
        room,
    )
    return state, experts_NBL.reshape(layers, tokens_BL.size)


def _cache(
    prompts: LayerKV, routers: RouterCaches, ends_BL, leaves_BQ, positions_BL, room: int
) -> TreeKVCache:
    batch, sequences = leaves_BQ.shape

    def own(prompts_BLGW):  # after the axis of the groups
        shape = (prompts_BLGW.shape[0], batch, sequences, room, *prompts_BLGW.shape[-2:])
        return jnp.zeros(shape, prompts_BLGW.dtype)

    node_L, leaf_BQ1 = jnp.arange(ends_BL.shape[1]), leaves_BQ[..., None]
    return TreeKVCache(
        prompts=prompts,
        own=jax.tree.map(own, prompts),
        routers=routers,
        count=jnp.int32(0),
        sees_BQL=(node_L <= leaf_BQ1) & (leaf_BQ1 < ends_BL[:, None, :]),
        depths_BQ=jnp.take_along_axis(positions_BL, leaves_BQ, axis=1),
    )


def _attend(
    query_BQHW: Float[Array, "B Q H W"],
    prompts: tuple,
    own: tuple,
    sees_BQL: Bool[Array, "B Q L"],
    last: Int[Array, ""],
) -> Float[Array, "B Q H W"]:
    """Attention to the path of a prompt and to the tokens behind it; scores are float32."""
    (key_BLGW, value_BLGW), (key_BQMGW, value_BQMGW) = prompts, own
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
