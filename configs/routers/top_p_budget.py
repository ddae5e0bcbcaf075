r"""Top-p that uses 1.8 experts per token from the second step on, at the quickstart's size.

    python train.py --config=configs/routers/top_p_budget.py --workdir=runs/top_p_budget

The router of the paper (arXiv 2403.07652) with a budget: after every step, p becomes the quantile
that would have held it in that batch, over all layers together, so that layers may differ.  Expect
a mean of 1.8 within 3% from the first steps to the last, and a p that grows or falls as routers
become surer of themselves or less (``router_threshold`` in ``metrics.jsonl``).  A run may go on
with another budget:

    python train.py --config=configs/routers/top_p_budget.py --workdir=runs/top_p_budget \
        --config.train.steps=800 --config.model.moe.top_p.experts_per_token=2.5
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    settings.model.moe.top_p.experts_per_token = 1.8
    return settings
