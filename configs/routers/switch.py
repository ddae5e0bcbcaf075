"""Switch Transformer at the quickstart's size: one expert per token, of limited capacity.

    python train.py --config=configs/routers/switch.py --workdir=runs/switch

Switch (arXiv 2101.03961): the expert's output is weighed by its raw probability; the router reads
tokens with 1% of noise; an expert takes 1.25 T / E tokens, first come, first served, and the others
pass by on the residual stream.  The paper's coefficient of balance, 1e-2, belongs to the sum over
all choices, which are one per token.  The paper evaluates at a capacity factor of 2.  Not here: its
smaller initial weights, and dropout of hidden units inside experts.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.top_k.k = "top_k", 1
    moe.transforms, moe.capacity.factor, moe.capacity.minimum = "capacity", 1.25, 1
    moe.capacity.priority = "token"
    moe.regularizers, moe.jitter.epsilon = "jitter", 1e-2
    settings.loss.balance.weight, settings.loss.balance.counts = 1e-2, "sum"
    settings.loss.entropy.weight = 0.0
    return settings
