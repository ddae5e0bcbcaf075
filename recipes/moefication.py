"""MoEfication: a dense ReLU model split into experts, with routers that are fitted, not trained.

    python -m dynmoe_jax.surgery --recipe=recipes/moefication.py --workdir=runs/moefication

arXiv 2110.01786.  Hidden units are divided by clusters of their weights, by what is active
together, and, as a control, by chance; tokens use a quarter of the experts.

Result (laptop, one seed, two cores that other work shared, 5 minutes): of the dense model's 2.410
held-out bits per byte, two of eight experts leave 2.535 by co-activation, 2.545 by clusters and
2.576 by chance.  Squared errors of the layers' outputs with fitted routers are 0.11 to 0.24 of
their squares, 0.25 to 0.32 and 0.47 to 0.52, and an oracle's at most 0.014 less.
"""

import dataclasses

from dynmoe_jax.surgery.operations.fit_router import FitRouter
from dynmoe_jax.surgery.operations.split import Split
from dynmoe_jax.surgery.recipes import Comparison, Operate, Recipe, Train, sizes

EXPERTS, CHOSEN = 8, 2


def get_recipe(size, seed, data):
    """A dense ReLU model, split in three ways, with routers fitted to each."""
    cfg = sizes.dense(size, seed, data)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, activation="relu"))
    dense, steps, fitted = Train("dense", cfg), [], {}
    for by in ("clusters", "coactivation", "random"):
        split = Operate(f"split_{by}", Split(num_experts=EXPERTS, by=by), (dense,))
        fitted[by] = Operate(f"routed_{by}", FitRouter(top_k=CHOSEN), (split,))
        steps += [split, fitted[by]]
    compared = [Comparison(fitted[by], fitted["random"]) for by in ("clusters", "coactivation")]
    return Recipe((dense, *steps), tuple(compared))
