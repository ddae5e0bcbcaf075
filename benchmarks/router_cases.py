"""What `benchmarks.routers` and `benchmarks.router_cost` compare: routers at one mean, two experts.

Each case says what differs from ``configs/quickstart.py`` (8 experts).  Losses are those that the
routers declare; quickstart's own weight of the entropy loss goes back to that.
"""

from collections.abc import Mapping

MEAN = 2
"""Experts per token."""

CASES: dict[str, Mapping[str, str | float]] = {
    "dense": {"moe.every_n_layers": 0, "hidden_width": 256 * MEAN},
    "top_1": {"moe.router": "top_k", "moe.top_k.k": 1},
    "top_2": {"moe.router": "top_k", "moe.top_k.k": MEAN},
    "top_p": {"moe.router": "top_p"},
    "top_p_budget": {"moe.router": "top_p", "moe.top_p.experts_per_token": MEAN},
    "relu": {"moe.router": "relu", "moe.relu.experts_per_token": MEAN},
    "sigmoid_bias": {"moe.router": "sigmoid_bias", "moe.sigmoid_bias.k": MEAN},
    "hash": {"moe.router": "hash", "moe.hash.k": MEAN},
}
"""Settings of the model by case; ``top_p`` alone finds its mean by itself, from the paper's p."""

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
