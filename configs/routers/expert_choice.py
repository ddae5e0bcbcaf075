"""Expert choice at the quickstart's size: every expert takes a quarter of each sequence.

    python train.py --config=configs/routers/expert_choice.py --workdir=runs/expert_choice

Mixture-of-Experts with expert choice routing (arXiv 2202.09368): experts choose tokens, so their
load is even without any loss, and tokens have two experts on average and none or all of them by
themselves.  Whether a token is chosen depends on later ones: the model trains and is reported, its
held-out loss is no measure of a language model, and it writes nothing.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.allow_non_causal = "expert_choice", True
    moe.expert_choice.experts_per_token = 2.0
    settings.loss.entropy.weight = 0.0
    return settings
