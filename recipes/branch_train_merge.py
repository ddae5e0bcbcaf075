"""Branch-Train-Merge: models trained apart on parts of the text write together, or become one.

    python -m dynmoe_jax.surgery --recipe=recipes/branch_train_merge.py --workdir=runs/btm \\
        --processes=2

arXiv 2208.03306.  A seed model is trained on all text, a branch of it on each domain.  Their
ensemble weighs them token by token by the domain that the text so far speaks of; their average is
one model.  Controls: an ensemble of as many branches that were trained on documents dealt out by
chance, and the seed model trained on with the FLOPs of all branches.

Result (laptop, one seed, 23 minutes of steps one after another on two cores that other work
shared): held-out bits per byte of the ensemble 2.094, of that of branches by chance 2.178, of the
average 2.273, of the dense model 2.019.  So domains matter, the ensemble is far better than the
average, and with so little training the dense model is better still.  In the median document one
branch has nine tenths of the posterior after 3 tokens of code or docs, 4 of prose.
"""

from dynmoe_jax.edits.settings import edited
from dynmoe_jax.surgery.operations.average import Average
from dynmoe_jax.surgery.recipes import Comparison, Ensemble, Operate, Recipe, Train, sizes
from dynmoe_jax.surgery.request import Options


def get_recipe(size, seed, data):
    """Seed, branches by domain and by chance, both ensembles, average, and the dense model."""
    begin = Train("seed", sizes.dense(size, seed, data))
    domains, half = sizes.domains_of(data), sizes.share_of_steps(size, 0.5)

    def branch(name, **text):
        cfg = sizes.dense(size, seed + 1, data, steps=half)
        return Train(name, edited(cfg, {f"data.{k}": value for k, value in text.items()}), begin)

    branches = tuple(
        branch(f"branch_{domain}", domain_weights=sizes.one_of(domains, domain))
        for domain in domains
    )
    by_chance = tuple(
        branch(f"chance_{number}", part=f"{number}/{len(domains)}")
        for number in range(1, len(domains) + 1)
    )
    ensemble, control = Ensemble("ensemble", branches), Ensemble("ensemble_by_chance", by_chance)
    text = Options(tokens=sizes.heldout_tokens(size, domains))
    averaged = Operate("average", Average(), branches, text)
    spent = sum(branch.flops for branch in branches)
    dense = Train("dense_of_branches", sizes.dense(size, seed + 1000, data), begin).with_flops(
        spent
    )
    return Recipe(
        (begin, *branches, *by_chance, ensemble, control, averaged, dense),
        tuple(Comparison(ensemble, other) for other in (control, averaged, dense)),
    )
