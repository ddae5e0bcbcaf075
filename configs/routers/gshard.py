"""GShard at the quickstart's size: two experts per token, the second one by chance.

    python train.py --config=configs/routers/gshard.py --workdir=runs/gshard

GShard (arXiv 2006.16668, algorithm 1): weights of the pair sum to one; the second expert is kept
with probability min(1, 2 g2); first choices find a place before any second one.  The coefficient of
balance, 1e-2, belongs to first choices alone.  Expect dropped rows to fall as load evens out.

Text is written without capacity, since first choices of later tokens displace second ones of
earlier tokens.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.top_k.k, moe.top_k.renormalize = "top_k", 2, True
    moe.top_k.second, moe.top_k.second_threshold = "random", 0.5
    moe.transforms, moe.capacity.factor, moe.capacity.minimum = "capacity", 1.25, 4
    moe.capacity.priority = "choice"
    settings.loss.balance.weight, settings.loss.balance.counts = 1e-2, "first_choice_only"
    settings.loss.entropy.weight = 0.0
    return settings
