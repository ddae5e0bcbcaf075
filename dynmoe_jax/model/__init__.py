"""Flax NNX modules: attention, feed-forward, decoder; its loss and its FLOPs."""

from dynmoe_jax.model.decoder import (
    Decoder,
    decoder_shapes,
    decoder_structure,
    parameter_shapes,
    variable_shapes,
)
from dynmoe_jax.model.output import DecoderOutput, LayerRouting

__all__ = [
    "Decoder",
    "DecoderOutput",
    "LayerRouting",
    "decoder_shapes",
    "decoder_structure",
    "parameter_shapes",
    "variable_shapes",
]
