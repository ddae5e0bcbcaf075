"""ST-MoE at the quickstart's size: top-2 with the router z-loss, in every fourth layer.

    python train.py --config=configs/routers/st_moe.py --workdir=runs/st_moe

ST-MoE (arXiv 2202.08906): balance 1e-2 (the sum over all choices), router z-loss 1e-3, z-loss of
the output 1e-4, capacity factor 1.25 by order of choice. The dense layer beside each MoE layer,
which the paper puts before or behind it, is a branch here. Not here: GEGLU, and dropout of hidden
units inside experts while fine-tuning.

Text is written without capacity, since first choices of later tokens displace second ones of
earlier tokens.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.top_k.k, moe.top_k.renormalize = "top_k", 2, True
    moe.every_n_layers, moe.layer_offset = 4, 3
    moe.shared_hidden_width = settings.model.hidden_width = 512
    moe.transforms, moe.capacity.factor, moe.capacity.priority = "capacity", 1.25, "choice"
    settings.loss.balance.weight, settings.loss.balance.counts = 1e-2, "sum"
    settings.loss.router_z.weight, settings.loss.z_weight = 1e-3, 1e-4
    settings.loss.entropy.weight = 0.0
    return settings
