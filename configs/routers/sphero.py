"""SpheroMoE slots at the quickstart's size (MoE Jetpack, arXiv 2406.04801).

    python train.py --config=configs/routers/sphero.py --workdir=runs/sphero

Soft slots by cosines with learned temperatures.  A token's output depends on later tokens, so such
a model writes no text: it trains and reports a held-out loss that is no measure of a language
model.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.allow_non_causal = "sphero", True
    moe.sphero.slots = 32
    settings.loss.entropy.weight = 0.0
    return settings
