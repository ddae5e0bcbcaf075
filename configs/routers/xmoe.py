"""XMoE at the quickstart's size: top-p 0.9 over narrow experts, served by rank over capacity.

    python train.py --config=configs/routers/xmoe.py --workdir=runs/xmoe

XMoE (arXiv 2403.18926): a token takes the fewest experts whose probabilities pass 0.9, weighed by
these; an expert that has no place left takes first choices before second ones, and the
load-balancing loss counts first choices alone.  Every second layer is MoE, with experts a quarter
as wide as the quickstart's.  Expect a start near 24 of 32 experts per token, of which the capacity
computes 8 on average (``rows_dropped``); the number falls as the router learns.

Text is written without capacity, since first choices of later tokens displace second ones of
earlier tokens.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.num_experts, moe.hidden_width = 32, 64
    moe.every_n_layers, moe.layer_offset = 2, 1
    settings.model.hidden_width = 512
    moe.top_p.threshold = 0.9
    # The released code's factor: a batch computes at most eight experts per token.
    moe.transforms = "capacity"
    moe.capacity.factor, moe.capacity.priority = 8.0, "choice"
    settings.loss.balance.counts = "first_choice_only"
    settings.loss.entropy.weight = 0.0
    return settings
