"""LLaMA-MoE: a dense model split into experts of which tokens use half, trained on.

    python -m dynmoe_jax.surgery --recipe=recipes/llama_moe.py --workdir=runs/llama_moe

arXiv 2406.16554.  Units are divided by chance (the paper's best), or by their importance for
clusters of text with some that experts share.
"""

from dynmoe_jax.surgery.operations.split import Split
from dynmoe_jax.surgery.recipes import Comparison, Operate, Recipe, Train, sizes

EXPERTS, CHOSEN = 8, 4


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
    return Recipe(tuple(steps), (Comparison(steps[-1], steps[2]),))
