"""Model FLOPs, counted from the experts really used, never from a static k."""

from dynmoe_jax import config
from dynmoe_jax.experts.layer_cost import expert_flops


def forward_flops(model: config.Model, tokens: float, length: int, rows: float) -> float:
    """FLOPs (a multiply-add is two) of one forward pass.

    Matrix products only.  Attention is counted as causal over whole sequences: each position
    attends to half of them on average.

    Args:
      model: the architecture.
      tokens: positions computed, padding included.
      length: L, positions per sequence.
      rows: (token, expert) pairs computed, summed over the MoE layers.
    """
    projections = (
        2 * model.width * model.head_width * (2 * model.num_heads + 2 * model.num_kv_heads)
    )
    scores = 2 * 2 * (length / 2) * model.num_heads * model.head_width
    moe_layers = model.num_moe_layers
    router = 2 * model.width * (model.moe.num_experts + model.moe.shared_gate)
    shared = expert_flops(1, model.width, model.moe.shared_hidden_width)
    dense = expert_flops(1, model.width, model.hidden_width)
    head = 2 * model.width * model.vocab_size
    per_token = (
        model.num_layers * (projections + scores)
        + moe_layers * (router + shared)
        + (model.num_layers - moe_layers) * dense
        + head
    )
    per_row = model.moe.expert_kind.flops_per_row(model.width, model.moe.hidden_width)
    return tokens * per_token + rows * per_row


def training_flops(model: config.Model, tokens: float, length: int, rows: float) -> float:
    """FLOPs of forward and backward: three times the forward, recomputation not counted."""
    return 3.0 * forward_flops(model, tokens, length, rows)
