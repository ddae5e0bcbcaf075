"""Top-2 routing at the quickstart's size (arXiv 2101.03961, 2006.16668), without capacity.

    python train.py --config=configs/routers/top_k.py --workdir=runs/top_k

The baseline of the Top-P paper: every token uses two experts, weighed by their raw probabilities.
The presets of Switch, GShard, Mixtral and others say what they do otherwise.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router = "top_k"
    moe.top_k.k = 2
    # Entropy is the dynamic model's loss; a fixed k has no use for it.
    settings.loss.entropy.weight = 0.0
    return settings
