"""DS-MoE at the quickstart's size: all experts in training, a few of them at inference.

    python train.py --config=configs/routers/dense.py --workdir=runs/dense
    python -m dynmoe_jax.inference --workdir=runs/dense --prompt='def ' \\
        --config.model.moe.dense.k=3
    python -m dynmoe_jax.evaluation --workdir=runs/dense --perplexity=python \\
        --config.model.moe.dense.threshold=0.1

Dense Training, Sparse Inference (arXiv 2404.05567): every token goes through all eight experts, so
a step costs four times the experts of top-2.  The mutual-information loss makes tokens sure of
their experts and spreads them; how many they use at inference is said when generating or
evaluating, and held-out loss in training is that of all.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    settings.model.moe.router = "dense"
    settings.loss.entropy.weight = 0.0
    settings.loss.mutual_information.weight = 3e-2
    return settings
