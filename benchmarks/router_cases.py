"""What `benchmarks.routers` and `benchmarks.router_cost` compare: routers at one mean, two experts.

Each case says what differs from ``configs/quickstart.py`` (8 experts).  Losses are those that the
routers declare; quickstart's own weight of the entropy loss goes back to that.
"""

from collections.abc import Mapping

MEAN = 2
"""Experts per token."""

FITTED = ("threshold",)
"""Routers that are fitted to a trained model (:mod:`dynmoe_jax.surgery`), so that there is nothing
to train."""

CASES: dict[str, Mapping[str, str | float | bool]] = {
    "dense": {"moe.every_n_layers": 0, "hidden_width": 256 * MEAN},
    "top_1": {"moe.router": "top_k", "moe.top_k.k": 1},
    "top_2": {"moe.router": "top_k", "moe.top_k.k": MEAN},
    "top_p": {"moe.router": "top_p"},
    "top_p_budget": {"moe.router": "top_p", "moe.top_p.experts_per_token": MEAN},
    "dtop_p": {
        "moe.router": "top_p",
        "moe.top_p.experts_per_token": MEAN,
        "moe.top_p.budget_rule": "proportional_integral",
        "moe.top_p.normalize_logits": True,
        "moe.top_p.renormalize": True,
    },
    "relu": {"moe.router": "relu", "moe.relu.experts_per_token": MEAN},
    "block_ffn": {
        "moe.router": "block_ffn",
        # Two matrices each, as wide in all as two experts of three matrices.
        "moe.experts": "silu",
        "moe.num_experts": 32,
        "moe.hidden_width": 64,
        "moe.block_ffn.experts_per_token": 6 * MEAN,
    },
    # One expert at inference; in training all are computed.
    "gumbel": {"moe.router": "gumbel", "moe.gumbel.falls_for": 300},
    "sigmoid_bias": {"moe.router": "sigmoid_bias", "moe.sigmoid_bias.k": MEAN},
    "noisy_top_k": {"moe.router": "noisy_top_k", "moe.noisy_top_k.k": MEAN},
    "hash": {"moe.router": "hash", "moe.hash.k": MEAN},
    "expert_choice": {
        "moe.router": "expert_choice",
        "moe.expert_choice.experts_per_token": MEAN,
        "moe.allow_non_causal": True,
    },
    "seq_top_k": {
        "moe.router": "seq_top_k",
        "moe.seq_top_k.k": MEAN,
        "moe.allow_non_causal": True,
    },
    "expert_threshold": {
        "moe.router": "expert_threshold",
        "moe.expert_threshold.experts_per_token": MEAN,
        "moe.expert_threshold.warmup_steps": 60,
        "moe.expert_threshold.decay": 0.95,
    },
    "top_any": {
        "moe.router": "top_any",
        "moe.top_any.wait": 50,
        "moe.top_any.window": 50,
        "moe.top_any.rest": 50,
    },
    "null_experts": {
        "moe.router": "null_experts",
        "moe.null_experts.k": 2 * MEAN,
        "moe.null_experts.nulls": 8,
    },
    "shared_null": {
        "moe.router": "shared_null",
        "moe.shared_null.k": 2 * MEAN,
        "moe.shared_null.density": 0.5,
    },
    "moe_plus_plus": {
        "moe.router": "moe_plus_plus",
        "moe.moe_plus_plus.k": 3,
        "moe.moe_plus_plus.constants": 1,
    },
    "zero_computation": {
        "moe.router": "zero_computation",
        "moe.zero_computation.k": 3,
        "moe.zero_computation.identities": 4,
        "moe.zero_computation.experts_per_token": MEAN,
    },
    # As many slots in all as a sequence has tokens, times two.
    "soft": {"moe.router": "soft", "moe.soft.slots": 16 * MEAN, "moe.allow_non_causal": True},
    "sphero": {
        "moe.router": "sphero",
        "moe.sphero.slots": 16 * MEAN,
        "moe.allow_non_causal": True,
    },
    "dense_router": {"moe.router": "dense"},
}
"""Settings of the model by case.  Some find their mean by themselves: ``top_p`` from the paper's p,
``top_any`` from what it learns; ``dense_router`` (DS-MoE) computes all experts."""

SEVERAL_SEEDS = ("dense", "top_1", "top_2", "top_p", "top_p_budget", "relu", "sigmoid_bias")
"""Cases that are trained from several seeds."""


def flags_of(name: str) -> list[str]:
    """Flags of ``train.py`` for a case."""
    own = CASES[name]
    flags = [f"--config.model.{key}={value}" for key, value in own.items()]
    if own.get("moe.router") not in (None, "top_p"):
        # quickstart sets it for top-p; other routers have no such loss, or their own weight.
        flags.append("--config.loss.entropy.weight=auto")
    return flags
