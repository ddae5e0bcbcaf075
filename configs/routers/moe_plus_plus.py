"""MoE++ at the quickstart's size: top-2 of 8 experts, a zero, a copy and two constant ones.

    python train.py --config=configs/routers/moe_plus_plus.py --workdir=runs/moe_plus_plus

MoE++ (arXiv 2410.07348): free experts give nothing, the token itself, or a mixture of it and a
learned vector, and a router adds the logits of the MoE layer before, times a matrix.  With tau =
0.75 the load-balancing loss is even where tokens use 1.2 experts on average; a smaller tau sends
more of them to free experts.  The paper's capacity of an expert, 1.1 times its share, is
``--config.model.moe.transforms=capacity --config.model.moe.capacity.factor=0.66``.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router = "moe_plus_plus"
    moe.moe_plus_plus.zeros, moe.moe_plus_plus.copies, moe.moe_plus_plus.constants = 1, 1, 2
    settings.loss.entropy.weight = 0.0
    return settings
