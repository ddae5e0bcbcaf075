"""AdaMoE at the quickstart's size: top-3 of 8 experts and 8 null ones.

    python train.py --config=configs/routers/null_experts.py --workdir=runs/null_experts

AdaMoE (arXiv 2406.13233): a null expert computes nothing, so a token that takes one has a slot less
for the others.  The load-balancing loss counts all null experts as one group.  Expect 1.5 experts
per token where the load is even; more ``nulls`` or a smaller k bring the mean down.  The paper
finds that quality suffers below 1.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router = "null_experts"
    moe.null_experts.k, moe.null_experts.nulls = 3, 8
    settings.loss.entropy.weight = 0.0
    return settings
