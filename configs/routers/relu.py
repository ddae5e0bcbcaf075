"""ReMoE at the quickstart's size (arXiv 2412.14711): experts with a positive logit, 2 on average.

    python train.py --config=configs/routers/relu.py --workdir=runs/relu

Half of the experts are used at first; ``l1_coefficient`` grows from 1e-8 by a fifth in every step
until gates are as sparse as asked for, which takes most of the quickstart's 600 steps, and holds
them there.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router = "relu"
    moe.relu.experts_per_token = 2.0
    # Gates are no distribution.
    settings.loss.entropy.weight = 0.0
    return settings
