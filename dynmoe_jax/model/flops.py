"""Model FLOPs, counted from the experts really used, never from a static k."""

from collections import Counter
from collections.abc import Sequence

from dynmoe_jax import config
from dynmoe_jax.config.layers import LayerSettings
from dynmoe_jax.experts.layer_cost import expert_flops


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
      rows: (token, expert) pairs computed in each MoE layer; or summed over them, where their
        experts are equally wide.
    """
    head = 2 * model.width * model.vocab_size
    layers = Counter(model.by_layer)
    per_token = sum(count * _of_token(layer, length) for layer, count in layers.items())
    return tokens * (per_token + head) + _of_experts(model, rows)


def _of_token(layer: LayerSettings, length: int) -> float:
    """FLOPs of one token in a layer, without those of routed experts."""
    model, moe = layer.model, layer.model.moe
    projections = (
        2 * model.width * model.head_width * (2 * model.num_heads + 2 * model.num_kv_heads)
    )
    scores = 2 * 2 * (length / 2) * model.num_heads * model.head_width
    if not layer.is_moe:
        return projections + scores + expert_flops(1, model.width, model.hidden_width)
    router = 2 * model.width * (moe.num_experts + moe.shared_gate)
    return projections + scores + router + expert_flops(1, model.width, moe.shared_hidden_width)


def _of_experts(model: config.Model, rows: float | Sequence[float]) -> float:
    """FLOPs of the routed experts."""
    per_row = [
        moe.expert_kind.flops_per_row(model.width, moe.hidden_width) for moe in model.moe_settings
    ]
    if len(set(per_row)) > 1:
        return sum(count * flops for count, flops in zip(rows, per_row, strict=True))
    return _total(rows) * per_row[0] if per_row else 0.0


def _total(rows: float | Sequence[float]) -> float:
    return float(sum(rows)) if isinstance(rows, Sequence) else rows


def training_flops(
    model: config.Model, tokens: float, length: int, rows: float | Sequence[float]
) -> float:
    """FLOPs of forward and backward: three times the forward, recomputation not counted."""
    return 3.0 * forward_flops(model, tokens, length, rows)
