"""Branch-Train-MiX: branches trained on parts of the text become experts of one model.

    python -m dynmoe_jax.surgery --recipe=recipes/branch_train_mix.py --workdir=runs/btx \\
        --processes=2

arXiv 2403.07816.  A seed model is trained on all text, a branch of it on each domain; the mixture
of their feed-forwards is trained on all text again: two experts a token, and as its arms Switch,
sampled top-1, soft routing, experts that stay frozen, and the seed as one more expert.  Controls:
the average of the branches, their ensemble, and the seed model trained on with the FLOPs of
everything that the mixture is made of.

Measured on two cores with a model of width 64 on 3 MB of each domain (300 steps of the seed model,
150 of each branch and mixture; one seed; not yet at size laptop): held-out bits per byte of the
mixture 2.706, and less than the average's 2.858 in every domain (code 2.472 and 2.592, docs 2.779
and 3.123, prose 2.949 and 3.104); of soft routing 2.703, the seed as one more expert 2.710, frozen
experts and Switch 2.725, sampled top-1 2.731; of the ensemble 2.681, of the dense model 2.496.
Tokens use the expert of their own domain in 84 to 96 % of the cases in either layer, with another
seed in 82 to 91 %; two of three experts by chance would be 67 %.
"""

import dataclasses

from dynmoe_jax.surgery.operations.average import Average
from dynmoe_jax.surgery.operations.mix import Mix
from dynmoe_jax.surgery.recipes import Comparison, Ensemble, Evaluate, Operate, Recipe, Train, sizes
from dynmoe_jax.surgery.request import Options


def get_recipe(size, seed, data):
    """Seed, branches, average, ensemble, mixtures, and the dense model of the same FLOPs."""
    begin = Train("seed", sizes.dense(size, seed, data))
    domains, half = sizes.domains_of(data), sizes.share_of_steps(size, 0.5)
    text = Options(tokens=sizes.heldout_tokens(size, domains))

    def branch(domain):
        cfg = sizes.dense(size, seed + 1, data, steps=half)
        own = dataclasses.replace(cfg.data, domain_weights=sizes.one_of(domains, domain))
        return Train(f"branch_{domain}", dataclasses.replace(cfg, data=own), begin)

    def trained(name, operation, members, **train):
        cfg = sizes.dense(size, seed + 1000, data, steps=half, **train)
        return Train(f"{name}_trained", cfg, Operate(name, operation, members, text))

    branches = tuple(map(branch, domains))
    averaged = Operate("average", Average(), branches, text)
    ensemble = Ensemble("ensemble", branches)
    mixed = trained("mix", Mix(top_k=2), branches)
    # The seed has a part in what is averaged only through the branches.
    of_branches = ",".join(["0", *"1" * len(branches)])
    arms = (
        trained("switch", Mix(top_k=1, renormalize=False), branches),
        trained("sampled", Mix(router="gumbel"), branches),
        trained("soft", Mix(router="dense"), branches),
        dataclasses.replace(
            trained("mix", Mix(top_k=2), branches, trainable="not:experts"), name="frozen_experts"
        ),
        trained("with_seed", Mix(top_k=2, weights=of_branches), (begin, *branches)),
    )
    rest = sum(branch.flops for branch in branches) + mixed.flops
    dense = Train("dense", sizes.dense(size, seed + 1000, data), begin).with_flops(rest)
    controls = averaged, ensemble, dense
    # Whether tokens of a domain use its own expert more: share_by_domain of routing.json.
    analysis = Evaluate("mix_routing", mixed, ("--routing",))
    return Recipe(
        (begin, *branches, averaged, ensemble, mixed, analysis, *arms, dense),
        tuple(Comparison(mixed, other) for other in (*controls, *arms)),
    )
