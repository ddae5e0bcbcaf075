"""Expert thresholds at the quickstart's size: a shared expert, and one routed one on average.

    python train.py --config=configs/routers/expert_threshold.py --workdir=runs/expert_threshold

Expert Threshold (arXiv 2603.11535): every expert takes the tokens whose logit is above a moving
quantile of its logits.  For the first tenth of the run experts choose their best tokens; then the
thresholds do, and generation goes by them.  The paper's 4000 steps and decay of 0.999 are of runs
of tens of thousands of steps; here they are 60 and 0.95.  Expect 1.0 experts per token with an even
load and no loss that asks for it; `router_cut` is the mean threshold, `router_held_back` counts the
pairs that the guard of training leaves out.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router = "expert_threshold"
    moe.expert_threshold.experts_per_token = 1.0
    moe.expert_threshold.warmup_steps, moe.expert_threshold.decay = 60, 0.95
    # A token may get no routed expert.
    moe.shared_hidden_width = moe.hidden_width
    settings.loss.entropy.weight = 0.0
    return settings
