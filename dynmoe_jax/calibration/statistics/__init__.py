"""Statistics that a calibration can gather; each registers itself."""

from dynmoe_jax.calibration.statistics import (
    attention_input_samples,
    attention_mixed_samples,
    coactivation,
    expert_output_norm,
    ffn_input_samples,
    gradient_importance,
    routed_tokens,
    router_input,
    router_output,
    unit_frequency,
    unit_magnitude,
)
from dynmoe_jax.calibration.statistics.statistic import STATISTICS

__all__ = [
    "STATISTICS",
    "attention_input_samples",
    "attention_mixed_samples",
    "coactivation",
    "expert_output_norm",
    "ffn_input_samples",
    "gradient_importance",
    "routed_tokens",
    "router_input",
    "router_output",
    "unit_frequency",
    "unit_magnitude",
]
