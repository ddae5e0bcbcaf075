"""Qwen1.5-MoE's upcycling: fine-grained experts, shuffled, half of each drawn again.

    python -m dynmoe_jax.surgery --recipe=recipes/qwen_moe.py --workdir=runs/qwen_moe

Qwen1.5-MoE-A2.7B (Qwen's blog, 2024).  The control keeps every weight of the dense model.

Result (laptop, one seed, 17 minutes of steps on two cores that other work shared): from the dense
model's 2.412 held-out bits per byte, shuffled experts begin with 2.461 and come to 2.078; with half
of each drawn again 3.142 and 2.089, 0.011 more.
"""

from dynmoe_jax.surgery.operations.upcycle import Upcycle
from dynmoe_jax.surgery.recipes import Comparison, Operate, Recipe, Train, sizes


def get_recipe(size, seed, data):
    """A dense model, and fine-grained experts of it with and without new draws."""
    dense = Train("dense", sizes.dense(size, seed, data))
    fine = {"num_experts": 16, "granularity": 2, "top_k": 4, "shuffle": True}
    more = sizes.dense(size, seed + 1000, data)
    steps = [dense]
    for name, share in (("kept", 0.0), ("redrawn", 0.5)):
        made = Operate(name, Upcycle(**fine, reinit=share), (dense,))
        steps += [made, Train(f"{name}_trained", more, made)]
    return Recipe(tuple(steps), (Comparison(steps[-1], steps[2]),))
