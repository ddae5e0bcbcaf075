"""LLaMA-MoE: a dense model split into experts of which tokens use half, trained on.

    python -m dynmoe_jax.surgery --recipe=recipes/llama_moe.py --workdir=runs/llama_moe

arXiv 2406.16554.  Units are divided by chance (the paper's best), or by their importance for
clusters of text with some that experts share.  What was divided by chance is trained on text as it
comes, and with weights of domains that move toward those whose loss exceeds the dense model's
(dynamic batch loading, which the paper found no better than weights that stay).

Result (laptop, one seed, 16 minutes of steps on two cores that other work shared): held-out bits
per byte of the dense model 2.412, divided by chance 2.485 and trained on 2.117; with shared
important units 2.610 and 2.144, so chance is better here too.  Weights of domains that move give
2.077, 0.040 less than weights that stay (code 1.938 and 1.939, docs 2.339 and 2.411, prose 2.106
and 2.160).
"""

import dataclasses

from dynmoe_jax.surgery.operations.split import Split
from dynmoe_jax.surgery.recipes import Comparison, Operate, Recipe, Train, sizes

EXPERTS, CHOSEN = 8, 4
EVALUATED = {"laptop": 0.1, "tiny": 0.5}


def get_recipe(size, seed, data):
    """A dense model, split in two ways and trained on."""
    dense = Train("dense", sizes.dense(size, seed, data))
    more = sizes.dense(size, seed + 1000, data)
    chosen = {"num_experts": EXPERTS, "top_k": CHOSEN, "gates": "softmax", "scale": float(EXPERTS)}
    steps = [dense]
    for name, how in (
        ("random", {"by": "random"}),
        ("shared", {"by": "importance", "share": "inner"}),
    ):
        split = Operate(f"split_{name}", Split(**chosen, **how), (dense,))
        steps += [split, Train(f"{name}_trained", more, split)]
    _, divided, static, _, shared = steps
    dynamic = Train("random_dynamic", _moving(more, size), divided, reference=dense)
    return Recipe((*steps, dynamic), (Comparison(shared, static), Comparison(dynamic, static)))


def _moving(cfg, size):
    """The same training with weights of domains that move."""
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, reweighting="dynamic_batch_loading"),
        evaluation=dataclasses.replace(
            cfg.evaluation, every_steps=sizes.share_of_steps(size, EVALUATED[size])
        ),
    )
