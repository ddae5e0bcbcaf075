"""One decoder layer: attention, then a feed-forward, each added to the residual stream.

Training, the KV cache, tree decoding and the NaN report all compute a layer by
:meth:`Layer.__call__`; they differ in how queries meet keys, which they pass as ``mix``.

Axis legend: B batch, L positions, T = B L tokens, D model width.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dynmoe_jax import config
from dynmoe_jax.experts import StackedView
from dynmoe_jax.mesh.transfer_order import in_transfer_order
from dynmoe_jax.model.attention import Attention
from dynmoe_jax.model.components import rms_norm
from dynmoe_jax.model.dense_feed_forward import DenseFeedForward
from dynmoe_jax.model.feed_forward import MoEFeedForward
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.masks import between, full, on_stream
from dynmoe_jax.model.output import MoERecord
from dynmoe_jax.routing import Routing

Heads = tuple[Array, Array, Array]
"""Queries, keys and values, heads side by side."""

Mix = Callable[[Attention, Heads, TokenPositions], tuple[Float[Array, "B L D"], Any]]
"""``(attention, heads, positions) -> (what attention adds to the stream, keys and values)``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOutput:
    """The results of one layer; under ``jit``, those that nobody reads are never computed.

    Attributes:
      x_BLD: the residual stream behind the layer.
      attended_BLD: the residual stream between attention and feed-forward.
      kv: whatever ``mix`` returned beside its sum, such as keys and values.
      moe: the record of an MoE layer; None in a dense layer.
      previous_BLS: the router logits that the layers behind may read, see
        :class:`~dynmoe_jax.model.inputs.TokenPositions`.
      activations: sums over the activations of a dense layer, of each sequence, that training
        asks for; else None.
    """

    x_BLD: Float[Array, "B L D"]
    attended_BLD: Float[Array, "B L D"]
    kv: Any
    moe: MoERecord | None
    previous_BLS: Float[Array, "B L S"] | None = None
    activations: Mapping[str, Array] | None = None

    @property
    def routing(self) -> Routing | None:
        """The choices of an MoE layer's router; None in a dense layer."""
        return self.moe and self.moe.routing


def mix_all_positions(attention: Attention, heads: Heads, positions: TokenPositions):
    """Attends to all earlier positions of a document, as in training; keeps nothing."""
    return attention.mix(heads, positions), None


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, model: config.Model, is_moe: bool, *, rngs: nnx.Rngs):
        self.attention_norm = rms_norm(model, rngs)
        self.attention = Attention(model, rngs=rngs)
        self.feed_forward_norm = rms_norm(model, rngs)
        feed_forward = MoEFeedForward if is_moe else DenseFeedForward
        self.feed_forward = feed_forward(model, rngs=rngs)
        self.is_moe = is_moe
        self.layer_mask = full() if model.mask_steps else None

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        positions: TokenPositions,
        mix: Mix = mix_all_positions,
        stacked: StackedView | None = None,
    ) -> LayerOutput:
        """Computes the layer.

        Args:
          x_BLD: the residual stream.
          positions: of its tokens; segment 0 is padding, which uses no experts.
          mix: how queries meet keys and values.
          stacked: where the experts of an MoE layer lie among those of all layers, if known.
        """

        def attend(heads):
            mixed_BLD, kv = mix(self.attention, heads, positions.of_heads(self.attention.width))
            # Named, so that it is kept, and not the projection that it would be added up from.
            mixed_BLD = on_stream(self.attention_norm, mixed_BLD)
            return checkpoint_name(projected_BLD + mixed_BLD, "stream"), kv

        before_BLD, previous_BLS = x_BLD, positions.previous_BLS
        weights = self.feed_forward.weights(stacked)
        projected_BLD, heads = self.attention.project(self.attention_norm, x_BLD)
        attended_BLD, kv, weights = in_transfer_order(attend, heads, weights)
        x_BLD, found = self.feed_forward.added_to(
            attended_BLD, self.feed_forward_norm, positions, weights
        )
        record, sums = (found, None) if self.is_moe else (None, found)
        if self.is_moe:
            routing = found.routing
            positions = positions.behind(routing.logits_TE, routing.num_experts)
        behind = x_BLD, positions.previous_BLS
        if self.layer_mask is not None:
            faded = partial(between, self.layer_mask[...])
            behind = jax.tree.map(faded, behind, (before_BLD, previous_BLS))
        return LayerOutput(behind[0], attended_BLD, kv, record, behind[1], sums)
