"""Soft MoE at the quickstart's size: experts compute means of tokens.

    python train.py --config=configs/routers/soft.py --workdir=runs/soft

From Sparse to Soft Mixtures of Experts (arXiv 2308.00951); ``sphero.py`` does the same by cosines
(arXiv 2406.04801).  Eight experts with 32 slots for each sequence of 128 tokens compute
two rows per token, as many as top-2 does.  Slots are means of all tokens of a sequence, later ones
included: the model trains and is reported, its held-out loss is no measure of a language model,
and it writes nothing.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.allow_non_causal = "soft", True
    moe.soft.slots = 32
    settings.loss.entropy.weight = 0.0
    return settings
