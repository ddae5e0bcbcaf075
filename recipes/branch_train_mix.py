"""Branch-Train-MiX: branches trained on parts of the text become experts of one model.

    python -m dynmoe_jax.surgery --recipe=recipes/branch_train_mix.py --workdir=runs/btx \\
        --processes=2

arXiv 2403.07816.  A seed model is trained on all text, a branch of it on each domain; the mixture
of their feed-forwards is trained on all text again.  Controls: the average of the branches, and the
seed model trained on with the FLOPs of everything else.
"""

import dataclasses

from dynmoe_jax.surgery.operations.average import Average
from dynmoe_jax.surgery.operations.mix import Mix
from dynmoe_jax.surgery.recipes import Comparison, Operate, Recipe, Train, sizes

DOMAINS = ("code", "docs", "prose")
"""Of the text that a Python installation carries; with other text, name its own."""


def get_recipe(size, seed, data):
    """Seed, branches, average, mixture, and the dense model of the same FLOPs."""
    begin = Train("seed", sizes.dense(size, seed, data))
    half = sizes.share_of_steps(size, 0.5)
    branches = tuple(
        Train(f"branch_{domain}", _of_domain(size, seed, data, domain, half), begin)
        for domain in DOMAINS
    )
    averaged = Operate("average", Average(), branches)
    mixed = Operate("mix", Mix(top_k=2), branches)
    trained = Train("mix_trained", sizes.dense(size, seed + 1000, data, steps=half), mixed)
    rest = sum(branch.flops for branch in branches) + trained.flops
    dense = Train("dense", sizes.dense(size, seed + 1000, data), begin).with_flops(rest)
    return Recipe(
        (begin, *branches, averaged, mixed, trained, dense),
        (Comparison(trained, averaged), Comparison(trained, dense)),
    )


def _of_domain(size, seed, data, domain, steps):
    """Settings of a training on one domain alone."""
    cfg = sizes.dense(size, seed + 1, data, steps=steps)
    weights = ",".join(f"{name}={float(name == domain):g}" for name in DOMAINS)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, domain_weights=weights))
