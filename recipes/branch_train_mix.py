"""Branch-Train-MiX: branches trained on parts of the text become experts of one model.

    python -m dynmoe_jax.surgery --recipe=recipes/branch_train_mix.py --workdir=runs/btx \\
        --seeds=3 --processes=2

arXiv 2403.07816.  A seed model is trained on all text, a branch of it on each domain; the mixture
of their feed-forwards is trained on all text again: two experts a token, and as its arms Switch,
sampled top-1, soft routing, experts that stay frozen, and the seed as one more expert.  Controls:
the average of the branches, their ensemble, and the seed model trained on with the FLOPs of
everything that the mixture is made of.

Result (laptop, three seeds, two steps at a time on two cores that other work shared, 52 minutes):
held-out bits per byte of the mixture 2.085; 0.188 less than the average (0.168 to 0.208, 95 %), and
less in every domain of every seed (code 1.951 and 2.173, docs 2.271 and 2.547, prose 2.123 and
2.280).  The ensemble has 2.093, which these seeds do not tell from it (-0.027 to 0.012); the dense
model with all FLOPs 1.911: 0.174 less (0.135 to 0.213).  Of the arms, soft routing has 2.082, the
seed as one more expert 2.085, frozen experts and sampled top-1 2.099, Switch 2.101.  Tokens use the
expert of their own domain in 79 to 95 % of the cases, in every layer, domain and seed; two of three
experts by chance would be 67 %.
"""

import dataclasses

from dynmoe_jax.edits.settings import edited
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
        own = edited(cfg, {"data.domain_weights": sizes.one_of(domains, domain)})
        return Train(f"branch_{domain}", own, begin)

    def trained(name, operation, members, **train):
        cfg = sizes.dense(size, seed + 1000, data, steps=half, **train)
        return Train(f"{name}_trained", cfg, Operate(name, operation, members, text))

    branches = tuple(map(branch, domains))
    averaged = Operate("average", Average(), branches, text)
    ensemble = Ensemble("ensemble", branches)
    mixed = trained("mix", Mix(top_k=2), branches)
    # The seed has a part in what is averaged only through the branches.
    of_branches = ",".join(["0", *"1" * len(branches)])
    arms = [
        trained("sampled", Mix(router="gumbel"), branches),
        dataclasses.replace(
            trained("mix", Mix(top_k=2), branches, trainable="not:experts"), name="frozen_experts"
        ),
        trained("with_seed", Mix(top_k=2, weights=of_branches), (begin, *branches)),
    ]
    if size != "tiny":
        arms += [
            trained("switch", Mix(top_k=1, renormalize=False), branches),
            trained("soft", Mix(router="dense"), branches),
        ]
    rest = sum(branch.flops for branch in branches) + mixed.flops
    dense = Train("dense", sizes.dense(size, seed + 1000, data), begin).with_flops(rest)
    controls = averaged, ensemble, dense
    # Whether tokens of a domain use its own expert more: share_by_domain of routing.json.
    analysis = Evaluate("mix_routing", mixed, ("--routing",))
    return Recipe(
        (begin, *branches, averaged, ensemble, mixed, analysis, *arms, dense),
        tuple(Comparison(mixed, other) for other in (*controls, *arms)),
    )
