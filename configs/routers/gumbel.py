"""Sampled top-1 at the quickstart's size: relaxed draws in training, one expert at inference.

    python train.py --config=configs/routers/gumbel.py --workdir=runs/gumbel

One of the routings that Branch-Train-MiX compares (arXiv 2403.07816), by Gumbel-softmax (arXiv
1611.01144): a step of training computes all eight experts, a token at inference one of them.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    settings.model.moe.router = "gumbel"
    settings.model.moe.gumbel.falls_for = settings.train.steps
    settings.loss.balance.weight = 0.0
    settings.loss.entropy.weight = 0.0
    return settings
