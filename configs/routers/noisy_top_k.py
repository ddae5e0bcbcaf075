"""The sparsely-gated mixture of experts at the quickstart's size: noisy top-k gating.

    python train.py --config=configs/routers/noisy_top_k.py --workdir=runs/noisy_top_k

Shazeer et al. (arXiv 1701.06538): learned noise on the logits in training, and two soft losses,
squared variations of importance and load, each with 0.1, as in the paper's language models.  The
router starts at zero: noise alone spreads the tokens at first.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.noisy_top_k.k = "noisy_top_k", 2
    settings.loss.entropy.weight = 0.0
    return settings
