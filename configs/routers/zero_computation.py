"""LongCat-Flash's zero-computation experts at the quickstart's size: 6 of 16 experts and 8 free.

    python train.py --config=configs/routers/zero_computation.py --workdir=runs/zero_computation

LongCat-Flash (arXiv 2509.01322) has 512 experts, 256 identity experts, and 12 choices of which 8
are to be experts; here it is a thirty-second of that, with 6 choices.  Expect a mean of 4 experts
per token, which the bias of the experts holds without a loss, while tokens differ.  The paper's
gain of the bias and its weight of the balance loss are not known; these are this project's.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    # As many hidden units in all as the quickstart's 8 experts of 256.
    moe.router, moe.num_experts, moe.hidden_width = "zero_computation", 16, 128
    free = moe.zero_computation
    free.k, free.identities, free.experts_per_token = 6, 8, 4.0
    settings.loss.entropy.weight = 0.0
    return settings
