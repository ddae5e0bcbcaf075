"""Mixtral at the quickstart's size: two of eight experts, softmax over the pair.

    python train.py --config=configs/routers/mixtral.py --workdir=runs/mixtral

Mixtral 8x7B (arXiv 2401.04088): no capacity, nothing is dropped.  The release does not say how it
was trained: the coefficient, 2e-2, is that of its port in Hugging Face's transformers, which sums
over all choices.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.top_k.k, moe.top_k.softmax = "top_k", 2, "after"
    settings.loss.balance.weight, settings.loss.balance.counts = 2e-2, "sum"
    settings.loss.entropy.weight = 0.0
    return settings
