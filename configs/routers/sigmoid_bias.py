"""DeepSeek-V3's router at the quickstart's size: 4 of 16 experts, from 2 of 4 groups.

    python train.py --config=configs/routers/sigmoid_bias.py --workdir=runs/sigmoid_bias

DeepSeek-V3 (arXiv 2412.19437) has 256 experts in 8 groups, of which a token chooses 4, and 8
experts in these, one shared expert, and a first block of dense layers.  A bias that the choice
alone sees balances the load (arXiv 2408.15664), and a small loss that of each sequence.  Expect
``load_imbalance_by_layer`` to fall towards 1 and ``router_bias_max`` to settle; with
``--config.model.moe.sigmoid_bias.update_rule=quantile`` and one group the load is even after a
step.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    # As many hidden units in all as the quickstart's 8 experts of 256.
    moe.router, moe.num_experts, moe.hidden_width = "sigmoid_bias", 16, 128
    moe.dense_first_layers, moe.shared_hidden_width, moe.routed_scale = 1, 128, 2.5
    settings.model.hidden_width = 512
    moe.sigmoid_bias.k = 4
    moe.sigmoid_bias.groups, moe.sigmoid_bias.groups_chosen = 4, 2
    settings.loss.sequence_balance.weight = 1e-4
    settings.loss.entropy.weight = 0.0
    return settings
