"""DeepSeekMoE at the quickstart's size: fine experts, and one that all tokens share.

    python train.py --config=configs/routers/deepseek_moe.py --workdir=runs/deepseek_moe

DeepSeekMoE (arXiv 2401.06066): each of eight experts is cut in four; one of the 32 is shared, seven
of 31 routed ones are chosen, weighed by raw probabilities; the first layer is dense.  The paper's
coefficient, 1e-2 for its 2B model, belongs to counts over their number: the loss is 1 at even load.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.top_k.k = "top_k", 7
    moe.num_experts, moe.hidden_width, moe.shared_hidden_width = 31, 64, 64
    moe.dense_first_layers, settings.model.hidden_width = 1, 512
    settings.loss.balance.weight, settings.loss.balance.counts = 1e-2, "per_choice"
    settings.loss.entropy.weight = 0.0
    return settings
