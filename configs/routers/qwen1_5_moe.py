"""Qwen1.5-MoE at the quickstart's size: fine experts, and a shared one behind a gate.

    python train.py --config=configs/routers/qwen1_5_moe.py --workdir=runs/qwen1_5_moe

Qwen1.5-MoE-A2.7B (Qwen's blog, 2024; layer as in arXiv 2407.10671): four of 30 experts by raw
probabilities, and a shared expert as wide as four, weighed by a sigmoid of the token.  The
coefficient, 1e-3, is that of its port in Hugging Face's transformers, which sums over all choices.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.top_k.k = "top_k", 4
    moe.num_experts, moe.hidden_width = 30, 64
    moe.shared_hidden_width, moe.shared_gate = 256, True
    settings.model.attention_bias = True
    settings.loss.balance.weight, settings.loss.balance.counts = 1e-3, "sum"
    settings.loss.entropy.weight = 0.0
    return settings
