"""FactorLLM: units divided as they stand, and routers that imitate an oracle.

    python -m dynmoe_jax.surgery --recipe=recipes/factorllm.py --workdir=runs/factorllm

arXiv 2408.11855.  Routers alone are trained; those of the control learn from the language model's
loss and balance alone.

Result (laptop, one seed, 8 minutes of steps on two cores that other work shared): of the dense
model's 2.412 held-out bits per byte, three of four experts leave 2.436; routers that imitate the
oracle come to 2.430, those of the control to 2.432, which one seed does not tell apart.
"""

import dataclasses

from dynmoe_jax.surgery.operations.split import Split
from dynmoe_jax.surgery.recipes import Comparison, Operate, Recipe, Train, sizes

EXPERTS, CHOSEN = 4, 3


def get_recipe(size, seed, data):
    """A dense model, split, and trained on with and without imitation."""
    dense = Train("dense", sizes.dense(size, seed, data))
    split = Operate("split", Split(num_experts=EXPERTS, by="contiguous", top_k=CHOSEN), (dense,))
    more = sizes.dense(
        size, seed + 1000, data, steps=sizes.share_of_steps(size, 0.25), trainable="router"
    )
    control = Train("balance_alone", more, split)
    loss = dataclasses.replace(more.loss, imitation={"weight": 0.05})
    imitated = Train("imitation", dataclasses.replace(more, loss=loss), split)
    return Recipe((dense, split, control, imitated), (Comparison(imitated, control),))
