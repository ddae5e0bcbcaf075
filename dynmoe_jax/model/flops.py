"""Model FLOPs, counted from the experts really used, never from a static k."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from dynmoe_jax import config
from dynmoe_jax.config.layers import LayerSettings
from dynmoe_jax.experts.layer_cost import expert_flops
from dynmoe_jax.model.adjugate import expected_adjugates
from dynmoe_jax.model.linear.kind import attention_shapes
from dynmoe_jax.registry import chosen


def forward_flops(
    model: config.Model, tokens: float, length: int, rows: float | Sequence[float]
) -> float:
    """FLOPs (a multiply-add is two) of one forward pass.

    Matrix products only.  Attention is counted as causal over whole sequences: each position
    attends to half of them on average.

    Args:
      model: the architecture.
      tokens: positions computed, padding included.
      length: L, positions per sequence.
      rows: (token, expert) pairs computed in each MoE layer; or summed over them, where each has
        an equal part or their experts are equally wide.  Rows of adjugate experts follow from
        these, as if any two experts met in a token alike.
    """
    head = 2 * model.width * model.vocab_size
    layers = Counter(model.by_layer)
    per_token = sum(count * _of_token(layer, length) for layer, count in layers.items())
    return tokens * (per_token + head) + _of_experts(model, tokens, rows)


def _of_token(layer: LayerSettings, length: int) -> float:
    """FLOPs of one token in a layer, without those of routed experts."""
    model, moe = layer.model, layer.model.moe
    linear = chosen(model, "linear")
    shapes = attention_shapes(model)
    projections = sum(linear.flops(name, shape) for name, shape in shapes.items())
    scores = 2 * 2 * (length / 2) * model.num_heads * model.head_width
    if not layer.is_moe:
        kind = model.feed_forward_kind
        return projections + scores + kind.flops_per_row(model.width, model.hidden_width)
    declared = moe.route.parameters(model.width, moe.num_experts).values()
    router = 2 * sum(math.prod(parameter.shape) for parameter in declared)
    router += 2 * model.width * moe.shared_gate
    return projections + scores + router + expert_flops(1, model.width, moe.shared_hidden_width)


def _of_experts(model: config.Model, tokens: float, rows: float | Sequence[float]) -> float:
    """FLOPs of the routed experts, and of those that their groups have besides."""
    layers = model.moe_settings
    if not isinstance(rows, Sequence):
        rows = [rows / max(len(layers), 1)] * len(layers)
    flops = 0.0
    for moe, count in zip(layers, rows, strict=True):
        flops += count * _per_row(model, moe)
        if moe.adjugate_width and tokens:
            narrow = dataclasses.replace(moe, hidden_width=moe.adjugate_width)
            flops += tokens * expected_adjugates(moe, count / tokens) * _per_row(model, narrow)
    return flops


def _per_row(model: config.Model, moe: config.MoE) -> float:
    return moe.expert_kind.flops_per_row(model.width, moe.hidden_width)


def training_flops(
    model: config.Model, tokens: float, length: int, rows: float | Sequence[float]
) -> float:
    """FLOPs of forward and backward: three times the forward, recomputation not counted."""
    return 3.0 * forward_flops(model, tokens, length, rows)
