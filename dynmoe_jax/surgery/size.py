"""Size and cost of a model, by arithmetic over its settings."""

import dataclasses
import math

import jax.numpy as jnp

from dynmoe_jax import config
from dynmoe_jax.edits.places import stored_in
from dynmoe_jax.model.flops import forward_flops
from dynmoe_jax.model.parameters import active_parameters, count_parameters


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of a model, and what one token costs.

    Attributes:
      parameters: all of them.
      active_parameters: those that a token uses, by the mean that its routers expect.
      stored_bytes: of its parameters and router states, as they are stored.
      flops_per_token: of a forward pass of full sequences.
      kv_bytes_per_token: keys and values of all layers, in float32.
    """

    parameters: int
    active_parameters: int
    stored_bytes: int
    flops_per_token: float
    kv_bytes_per_token: int


def size_of(cfg: config.Config, dtype: str = "float32") -> Size:
    """The size of a model whose parameters are stored in a type."""
    model = cfg.model
    expected = [moe.route.bounds(moe.num_experts).expected for moe in model.moe_settings]
    numbers = sum(math.prod(stored.shape) for stored, _ in stored_in(model))
    layers = [layer.model for layer in model.by_layer]
    return Size(
        count_parameters(model),
        active_parameters(model, expected),
        numbers * jnp.dtype(dtype).itemsize,
        forward_flops(model, 1.0, cfg.data.seq_len, expected),
        sum(2 * 4 * layer.num_kv_heads * layer.head_width for layer in layers),
    )
