"""OpenMoE at the quickstart's size: a dense branch beside the experts of every fourth layer.

    python train.py --config=configs/routers/openmoe.py --workdir=runs/openmoe

OpenMoE (arXiv 2402.01739): y = x + MoE(LN x) + FFN(LN x); the branch is the expert that all
tokens share, without a gate. Top-2, balance 1e-2 (the sum over all choices), router z-loss 1e-4,
z-loss of the output 1e-3. Not here: its UL2 objective, Adafactor and GEGLU; SwiGLU has as many
parameters.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.top_k.k, moe.top_k.renormalize = "top_k", 2, True
    moe.every_n_layers, moe.layer_offset = 4, 3
    moe.shared_hidden_width = settings.model.hidden_width = 512
    settings.loss.balance.weight, settings.loss.balance.counts = 1e-2, "sum"
    settings.loss.router_z.weight, settings.loss.z_weight = 1e-4, 1e-3
    settings.loss.entropy.weight = 0.0
    return settings
