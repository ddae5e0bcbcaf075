"""Fine-grained upcycling with virtual groups and weights that are scaled, against whole experts.

    python -m dynmoe_jax.surgery --recipe=recipes/virtual_groups.py --workdir=runs/virtual_groups

"Upcycling Large Language Models into Mixture of Experts", arXiv 2410.07524.  Each feed-forward is
copied eight times; the fine-grained mixture cuts every copy into two, and tokens choose two copies,
that is four slices.  Both cost the same.

Result (laptop, one seed, 17 minutes of steps on two cores that other work shared): both mixtures
begin with the dense model's 2.412 held-out bits per byte (logits differ by less than 1e-6) and come
to 2.082 with whole copies, 2.085 with slices: 0.004 more, of no weight from one seed.
"""

from dynmoe_jax.surgery.operations.upcycle import Upcycle
from dynmoe_jax.surgery.recipes import Comparison, Operate, Recipe, Train, sizes

COPIES, GRANULARITY, CHOSEN = 8, 2, 2


def get_recipe(size, seed, data):
    """A dense model, and mixtures of whole and of cut copies."""
    dense = Train("dense", sizes.dense(size, seed, data))
    whole = Operate("whole", Upcycle(num_experts=COPIES, top_k=CHOSEN), (dense,))
    cut = Upcycle(
        num_experts=COPIES * GRANULARITY, granularity=GRANULARITY, top_k=CHOSEN * GRANULARITY
    )
    slices = Operate("slices", cut, (dense,))
    more = sizes.dense(size, seed + 1000, data)
    trained = [Train(f"{made.name}_trained", more, made) for made in (whole, slices)]
    return Recipe((dense, whole, slices, *trained), (Comparison(trained[1], trained[0]),))
