"""OpenMoE: UL2 that goes over to plain language modelling in the middle of the run.

    python -m dynmoe_jax.surgery --recipe=recipes/openmoe.py --workdir=runs/openmoe \\
        --processes=2

arXiv 2402.01739.  Every second block is x + MoE(norm(x)) + FFN(norm(x)); tokens take two experts
under a capacity.  Controls with the same FLOPs: UL2 to the end, and plain language modelling from
the beginning.  Held-out text is plain for all of them.  The page of `switched_routing` has the
paper's analyses: context independence, agreement of checkpoints, drops by position.  AdamW stands
for Adafactor.

Result (laptop, one seed, two steps at a time on two cores that other work shared, 19 minutes of
steps): held-out bits per byte of plain language modelling 2.405, of UL2 that goes over 2.555, of
UL2 to the end 2.706.  The first choices of a token fall on its most frequent expert in 67 and 63 %
of the cases in the two layers (25 % when shuffled); the last two checkpoints agree on 75 and 67 %
of them, the first two on 34 and 26 %.  Of choices 3 % are dropped in the first eight places of a
row, 9 % in the last eight, as the paper finds.
"""

import dataclasses

from dynmoe_jax import config
from dynmoe_jax.surgery.recipes import Comparison, Evaluate, Recipe, Train, sizes

EXPERTS, CHOSEN, EVERY = 8, 2, 2
SENTINELS = {"laptop": 32, "tiny": 16}


def get_recipe(size, seed, data):
    """UL2 then plain text, UL2 alone, plain text alone, and an analysis of the first."""
    half = sizes.share_of_steps(size, 0.5)
    switched = Train("switched", _ul2(size, seed, data, until_step=half))
    ul2 = Train("ul2", _ul2(size, seed, data))
    plain = Train("plain", _openmoe(size, seed, data))
    analyzed = Evaluate("switched_routing", switched, ("--routing",))
    return Recipe(
        (switched, ul2, plain, analyzed), (Comparison(switched, plain), Comparison(switched, ul2))
    )


def _openmoe(size, seed, data):
    """Settings of a model of OpenMoE's kind."""
    cfg = sizes.dense(size, seed, data)
    moe = config.MoE(
        router="top_k",
        top_k={"k": CHOSEN},
        num_experts=EXPERTS,
        hidden_width=cfg.model.hidden_width,
        shared_hidden_width=cfg.model.hidden_width,
        every_n_layers=EVERY,
        layer_offset=EVERY - 1,
        transforms="capacity",
        # Of a token's k places at even load; earlier tokens first, as in a causal model.
        capacity={"factor": 1.25 * CHOSEN, "priority": "token"},
    )
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, moe=moe),
        loss=config.Loss(
            balance={"weight": 0.01},
            router_z={"weight": 1e-4},
            z_weight=1e-3,
            chunk_tokens=cfg.loss.chunk_tokens,
        ),
        checkpoint=dataclasses.replace(cfg.checkpoint, keep=4),
    )


def _ul2(size, seed, data, **ul2):
    """The same with UL2."""
    cfg = _openmoe(size, seed, data)
    kind = dataclasses.replace(cfg.data.ul2, num_sentinels=SENTINELS[size], **ul2)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, corruption="ul2", ul2=kind))
