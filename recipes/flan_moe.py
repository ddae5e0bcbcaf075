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

from dynmoe_jax.edits.settings import edited
from dynmoe_jax.surgery.recipes import Comparison, Evaluate, Recipe, Train, sizes

CAP = 400
UNSEEN = "--instructions=tasks:mixture_unseen,tasks:target_unseen"
# Of about the dense model's FLOPs: two experts of half its hidden width, or one of all of it.
MIXTURES = {
    "top_2": {"router": "top_k", "top_k.k": 2},
    "switch": {"router": "top_k", "top_k.k": 1},
    "top_p": {"router": "top_p"},
}
FROZEN = {"router": "not:router", "experts": "not:experts", "all_but_experts": "experts"}


def mixture(cfg, name):
    """Settings with a mixture of eight experts for each feed-forward."""
    width = cfg.model.hidden_width // (1 if name == "switch" else 2)
    moe = {"every_n_layers": 1, "num_experts": 8, "hidden_width": width, **MIXTURES[name]}
    return edited(cfg, {f"model.moe.{setting}": value for setting, value in moe.items()})


def tuning(cfg, sources, seed, share, size, trainable=""):
    """Settings of a training on instructions, with dropout of experts where there are some."""
    changes = {
        "seed": seed,
        "data.sources": sources,
        "data.domain_weights": f"proportional:cap={CAP}",
        "data.max_megabytes": 0.0,
        "train.steps": sizes.share_of_steps(size, share),
        "train.objective": "response_only",
        "train.trainable": trainable,
        "optimizer.learning_rate": cfg.optimizer.learning_rate / 2,
        "optimizer.warmup_steps": 5,
    }
    if cfg.model.moe.every_n_layers:
        changes |= {"model.moe.regularizers": "expert_dropout"}
        changes |= {"model.moe.expert_dropout.rate": 0.25, "model.moe.expert_dropout.interval": 1}
    return edited(cfg, changes)


def get_recipe(size, seed, data):
    """Dense model and mixtures: untuned, and tuned by each regime."""
    dense = sizes.dense(size, seed, f"tasks:facts,{data or 'python'}")
    # As much of each other text as there is of facts.
    dense = edited(dense, {"data.max_megabytes": 0.6})
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
