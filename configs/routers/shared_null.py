"""One null logit (arXiv 2601.15370): up to 4 of the quickstart's 8 experts, those above it.

    python train.py --config=configs/routers/shared_null.py --workdir=runs/shared_null

The null logit stands in as many slots as make half of all slots null where the
load is even (``density``), so it is a threshold that each token has of its own.  Expect 2 experts
per token on average, which the load-balancing loss holds, and tokens with none and with 4.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router = "shared_null"
    moe.shared_null.k, moe.shared_null.density = 4, 0.5
    settings.loss.entropy.weight = 0.0
    return settings
