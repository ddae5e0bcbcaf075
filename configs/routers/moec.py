"""MoEC at the quickstart's size: clusters of experts that are alike, and cluster-wise dropout.

    python train.py --config=configs/routers/moec.py --workdir=runs/moec

MoEC (arXiv 2207.09094): the variance of probabilities is lowered within the cluster of a token's
expert and raised between clusters; half of the experts of every cluster are dead, drawn anew after
250 steps (here 50, of the quickstart's 600).  Gate loss 1e-2 with a variance coefficient of 1: mu
is 1e-2.  Capacity factor 2.  Not here: its cosine router, and the learned mix of expert and token.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.top_k.k, moe.num_experts = "top_k", 1, 16
    moe.transforms, moe.capacity.factor, moe.capacity.priority = "capacity", 2.0, "token"
    moe.regularizers = "expert_dropout"
    moe.expert_dropout.rate, moe.expert_dropout.clusters = 0.5, 4
    moe.expert_dropout.interval = 50
    settings.loss.balance.weight, settings.loss.balance.counts = 1e-2, "sum"
    settings.loss.cluster_variance.weight, settings.loss.cluster_variance.clusters = 1e-2, 4
    settings.loss.entropy.weight = 0.0
    return settings
