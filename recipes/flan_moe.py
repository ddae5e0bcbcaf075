"""Flan-MoE: instruction tuning of mixtures of experts and of a dense model, three regimes.

    python -m dynmoe_jax.surgery --recipe=recipes/flan_moe.py --workdir=runs/flan_moe

arXiv 2305.14705, fine-tuned as in ST-MoE (arXiv 2202.08906): loss on responses, tasks in proportion
with a cap, expert dropout.  Models that have read facts are (i) fine-tuned on two tasks, (ii) tuned
on a mixture of six others, (iii) first the one, then the other.  All answer by templates that no
training has; ablations freeze the router, the experts, or all but the experts.

Result (laptop, one seed, two cores that other work shared, under two hours; responses to
templates of no training that are matched exactly): nothing untuned; two experts a token directly
fine-tuned 16.5 %, instructed 37.7 %, instructed and then fine-tuned 26.1 %; the dense model 21.1,
41.5 and 27.1 %, Switch instructed 39.5 %, top-p 36.8 %. With the router frozen 31.5 %, with the
experts frozen 24.5 %, with all but the experts frozen 5.2 %. That tuning helps mixtures more than
dense models, as the paper finds, does not show at this size.
"""

import dataclasses

from dynmoe_jax import config
from dynmoe_jax.surgery.recipes import Comparison, Evaluate, Recipe, Train, sizes

CAP = 400
UNSEEN = "--instructions=tasks:mixture_unseen,tasks:target_unseen"
# Of about the dense model's FLOPs: two experts of half its hidden width, or one of all of it.
MIXTURES = {
    "top_2": {"router": "top_k", "top_k": {"k": 2}},
    "switch": {"router": "top_k", "top_k": {"k": 1}},
    "top_p": {"router": "top_p"},
}
FROZEN = {"router": "not:router", "experts": "not:experts", "all_but_experts": "experts"}


def mixture(cfg, name):
    """Settings with a mixture of eight experts for each feed-forward."""
    width = cfg.model.hidden_width // (1 if name == "switch" else 2)
    moe = config.MoE(num_experts=8, hidden_width=width, **MIXTURES[name])
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))


def tuning(cfg, sources, seed, share, size, **train):
    """Settings of a training on instructions, with those of a model that has experts."""
    steps = sizes.share_of_steps(size, share)
    moe = cfg.model.moe
    if moe.every_n_layers:
        moe = dataclasses.replace(
            moe, regularizers="expert_dropout", expert_dropout={"rate": 0.25, "interval": 1}
        )
    return dataclasses.replace(
        cfg,
        seed=seed,
        model=dataclasses.replace(cfg.model, moe=moe),
        data=dataclasses.replace(
            cfg.data, sources=sources, domain_weights=f"proportional:cap={CAP}", max_megabytes=0.0
        ),
        train=dataclasses.replace(cfg.train, steps=steps, objective="response_only", **train),
        optimizer=dataclasses.replace(
            cfg.optimizer, learning_rate=cfg.optimizer.learning_rate / 2, warmup_steps=5
        ),
    )


def get_recipe(size, seed, data):
    """Dense model and mixtures: untuned, and tuned by each regime."""
    dense = sizes.dense(size, seed, f"tasks:facts,{data or 'python'}")
    # As much of each other text as there is of facts.
    dense = dataclasses.replace(dense, data=dataclasses.replace(dense.data, max_megabytes=0.6))
    names = ["top_2"] if size == "tiny" else ["dense", *MIXTURES]
    steps, scores = [], {}

    def scored(step):
        scores[step.name] = Evaluate(f"{step.name}_scored", step, (UNSEEN,))
        steps.extend((step, scores[step.name]))
        return step

    for name in names:
        cfg = dense if name == "dense" else mixture(dense, name)
        on = {
            "mixture": tuning(cfg, "tasks:mixture", seed + 1000, 0.5, size),
            "target": tuning(cfg, "tasks:target", seed + 2000, 0.25, size),
        }
        base = scored(Train(f"{name}_untuned", cfg))
        tuned = scored(Train(f"{name}_instructed", on["mixture"], base))
        if name in ("dense", "top_2"):
            scored(Train(f"{name}_direct", on["target"], base))
            scored(Train(f"{name}_instructed_direct", on["target"], tuned))
        if name == "top_2":
            for part, trainable in FROZEN.items() if size != "tiny" else ():
                frozen = tuning(cfg, "tasks:mixture", seed + 1000, 0.5, size, trainable=trainable)
                scored(Train(f"{name}_frozen_{part}", frozen, base))
    pairs = [
        ("top_2_instructed", "top_2_untuned"),
        ("top_2_instructed_direct", "top_2_direct"),
        *(("top_2_instructed", f"{name}_instructed") for name in names if name != "top_2"),
    ]
    compared = [Comparison(scores[one], scores[other], "exact") for one, other in pairs]
    return Recipe(tuple(steps), tuple(compared))
