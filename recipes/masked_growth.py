"""Masked Structural Growth: a model that becomes larger while it trains, against the large one.

    python -m dynmoe_jax.surgery --recipe=recipes/masked_growth.py --workdir=runs/growth --seeds=3

"Masked Structural Growth", arXiv 2305.02869.  A model of half the width, hidden width, heads and
layers is trained for a quarter of the steps, and grows in all four at once; another grows inside
of its run, first in width, then in heads and layers.  The large model from scratch is given the
FLOPs of the first, and so is the second.

Result (laptop, three seeds, one core that other work shared, 40 minutes): the small model has 2.968
held-out bits per byte, and so has the grown one (logits differ by less than 1e-6).  Trained on, it
has 2.354, the one that grows inside of its run 2.324, the large one from scratch 2.484 with the
same FLOPs: 0.130 less (0.081 to 0.179, 95 %) and 0.160 less (0.129 to 0.190), both better from 3 of
3 seeds.
"""

import dataclasses

from dynmoe_jax.surgery.operations.grow import Grow
from dynmoe_jax.surgery.recipes import Comparison, Operate, Recipe, Train, sizes

GROWING = ("width", "hidden_width", "num_heads", "num_layers")


def get_recipe(size, seed, data):
    """The small model, what it grows to, one that grows inside of its run, one from scratch."""
    large = sizes.dense(size, seed, data)
    steps, mask_steps = (sizes.share_of_steps(size, share) for share in (0.25, 0.1))
    to = {name: getattr(large.model, name) for name in GROWING}
    half = {name: max(1, number // 2) for name, number in to.items()}
    half["num_kv_heads"] = half["num_heads"]
    begins = dataclasses.replace(large.model, **half)
    small = Train(
        "small", dataclasses.replace(sizes.dense(size, seed, data, steps=steps), model=begins)
    )
    more = sizes.dense(size, seed + 1000, data, steps=large.train.steps - steps)
    grown = Operate("grown", Grow(**to, mask_steps=mask_steps), (small,))
    trained = Train("grown_trained", more, grown)
    flops = small.flops + trained.flops

    parts = (steps // 2, GROWING[:2]), (steps, GROWING[2:])
    named = (f"{step}:{','.join(f'{name}={to[name]}' for name in names)}" for step, names in parts)
    in_run = dataclasses.replace(
        large,
        model=dataclasses.replace(begins, mask_steps=mask_steps),
        train=dataclasses.replace(large.train, grow=";".join(named)),
    )
    inside = Train("grown_inside", in_run).with_flops(flops)
    scratch = Train("from_scratch", large).with_flops(flops)
    return Recipe(
        (small, grown, trained, inside, scratch),
        (Comparison(trained, scratch), Comparison(inside, scratch)),
    )
