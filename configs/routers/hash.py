"""Hash routing at the quickstart's size (arXiv 2106.04426): two experts by the token's id.

    python train.py --config=configs/routers/hash.py --workdir=runs/hash

Nothing is learned of the routing, so this is the control of every analysis: a router that does no
better has learned nothing that the token's id does not say.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router = "hash"
    moe.hash.k = 2
    settings.loss.entropy.weight = 0.0
    return settings
