"""DTop-p at the quickstart's size: one p for all layers, moved by a controller.

    python train.py --config=configs/routers/dtop_p.py --workdir=runs/dtop_p

DTop-p (arXiv 2512.13996): logits are standardized and scaled by a factor that each layer learns,
weights are renormalized, and a proportional-integral controller moves p so that all layers
together use 1.8 experts per token; balance weighs 1e-4 and entropy 1e-3.  The gains of 0.5 and 0.5,
the first p and a factor of 1 are this project's: none were published.  Expect the mean to settle
within some 20 steps, and layers to part as their factors do.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    top_p = settings.model.moe.top_p
    top_p.normalize_logits, top_p.renormalize = True, True
    top_p.experts_per_token, top_p.budget_rule = 1.8, "proportional_integral"
    settings.loss.balance.weight, settings.loss.entropy.weight = 1e-4, 1e-3
    return settings
