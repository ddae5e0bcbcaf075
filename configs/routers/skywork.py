"""Skywork-MoE at the quickstart's size: normalized logits, and a coefficient for each layer.

    python train.py --config=configs/routers/skywork.py --workdir=runs/skywork

Skywork-MoE (arXiv 2406.06563): logits of a token have a deviation of 1; the loss is the squared
deviation of mean probabilities, and its coefficient follows what a layer drops: xi = 1/5, at most
0.01, memory 0.99.  Top-2 of 16; capacity factor 1.25 is this project's choice.

Text is written without capacity, since first choices of later tokens displace second ones of
earlier tokens.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.top_k.k, moe.top_k.renormalize = "top_k", 2, True
    moe.num_experts, moe.normalized_logits = 16, 1.0
    moe.transforms, moe.capacity.factor = "capacity", 1.25
    settings.loss.balance.weight = 0.0
    settings.loss.deviation.weight, settings.loss.deviation.controller = 1e-2, "drop_rate"
    settings.loss.entropy.weight = 0.0
    return settings
