"""Flax NNX modules: attention, feed-forward, decoder; its loss and its FLOPs."""

from dynmoe_jax.model.transformer import Decoder, DecoderOutput, LayerRouting, parameter_shapes

__all__ = ["Decoder", "DecoderOutput", "LayerRouting", "parameter_shapes"]
