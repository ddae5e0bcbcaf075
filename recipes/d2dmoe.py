"""D2DMoE: a dense model made sparse, split, and run with as many experts as a token needs.

    python -m dynmoe_jax.surgery --recipe=recipes/d2dmoe.py --workdir=runs/d2dmoe

arXiv 2310.04361.  A dense ReLU model is trained on with a penalty on hidden units that are on, then
split by clusters of its weights; routers are fitted to the norms of the experts' outputs.  The page
draws loss against FLOPs: a share of the largest score, a share of all scores, and, as a control, a
fixed number of experts.  The other control is the same without the penalty.  An arm replaces the
projections of attention by nets with half of their parameters, before the penalty.

Result (laptop, one seed, 25 minutes of steps on two cores that other work shared): after the
penalty 85.1 % of units are off, without it 73.3 %, at 2.257 and 2.260 held-out bits per byte.  At
equal FLOPs, a share of the largest score has 0.016 bits less than a fixed number of experts (0.013
without the penalty), a share of all scores 0.012 (0.006): at 3.91 MFLOPs a token, of 4.74 with all
experts on, 2.267 against 2.283.  Nets in place of projections cost 0.006 bits, 2.263 after the
penalty, and save 0.59 MFLOPs a token, so that at 3.33 it has 2.270; without them, 3.41 have 2.381.
"""

from dynmoe_jax.edits.settings import edited
from dynmoe_jax.surgery.operations.fit_norms import FitNorms
from dynmoe_jax.surgery.operations.fit_projections import FitProjections
from dynmoe_jax.surgery.operations.split import Split
from dynmoe_jax.surgery.recipes import Comparison, Efforts, Operate, Recipe, Sweep, Train, sizes

EXPERTS, PENALTY = 16, 1e-3
TAU, RULE = "model.moe.threshold.tau", "model.moe.threshold.rule"


def efforts(size):
    """Lines of the picture."""
    shares = (0.1, 0.5) if size == "tiny" else (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    masses = (0.9,) if size == "tiny" else (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    numbers = (2, 8) if size == "tiny" else (1, 2, 4, 6, 8, 10, 12, 16)
    return (
        Efforts("share of the largest", TAU, shares, ((RULE, "largest"),)),
        Efforts("share of all", TAU, masses, ((RULE, "cumulative"),)),
        Efforts("as many for each", "model.moe.threshold.k", numbers, ((RULE, "fixed"),)),
    )


def get_recipe(size, seed, data):
    """A dense model, trained on with and without the penalty; both split, fitted and swept."""
    cfg = sizes.dense(size, seed, data)
    dense = Train("dense", edited(cfg, {"model.activation": "relu"}))
    replaced = Operate("replaced", FitProjections(factor=0.5), (dense,))
    half = sizes.share_of_steps(size, 0.5)
    steps, trained = [dense, replaced], {}
    arms = {"sparsified": (PENALTY, dense), "control": (0.0, dense), "nets": (PENALTY, replaced)}
    for name, (weight, begin) in arms.items():
        more = sizes.dense(size, seed + 1000, data, steps=half, objective="sparsify")
        trained[name] = Train(name, edited(more, {"train.sparsify.weight": weight}), begin)
        steps.append(trained[name])
        if size == "tiny" and name != "sparsified":
            continue
        split = Operate(
            f"{name}_split", Split(num_experts=EXPERTS, by="clusters"), (trained[name],)
        )
        routed = Operate(f"{name}_routed", FitNorms(), (split,))
        steps += [split, routed, Sweep(f"{name}_swept", routed, efforts(size))]
    controls = (trained[name] for name in ("control", "nets"))
    return Recipe(tuple(steps), tuple(Comparison(trained["sparsified"], each) for each in controls))
