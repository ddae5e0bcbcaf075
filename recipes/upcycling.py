"""Sparse upcycling against training the dense model on (arXiv 2212.05055).

    python -m dynmoe_jax.surgery --recipe=recipes/upcycling.py --workdir=runs/upcycling --seeds=3

A dense model is trained; then it is trained on as it is, and once more as a mixture of eight copies
of its feed-forwards.  Both are given the same FLOPs after that.

Result (laptop, three seeds on two cores that other work shared, 29 minutes): the dense model
trained on for 500 steps has 2.089 held-out bits per byte, the mixture, for which the same FLOPs
are 346 steps of two experts, 2.158: 0.069 more (0.065 to 0.073, 95 %), better from 0 of 3 seeds.
After half a million tokens one more step still teaches more than one more expert; the paper's
gains come with budgets of a large part of the dense model's.
"""

from dynmoe_jax.surgery.operations.upcycle import Upcycle
from dynmoe_jax.surgery.recipes import Comparison, Operate, Recipe, Train, sizes


def get_recipe(size, seed, data):
    """Dense model, its continuation, and the mixture made of it."""
    dense = Train("dense", sizes.dense(size, seed, data))
    mixture = Operate("upcycled", Upcycle(num_experts=8, top_k=2), (dense,))
    more = sizes.dense(size, seed + 1000, data)  # other text order than before
    continued = Train("dense_continued", more, dense)
    trained = Train("upcycled_trained", more, mixture).with_flops(continued.flops)
    return Recipe((dense, continued, mixture, trained), (Comparison(trained, continued),))
