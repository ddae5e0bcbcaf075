r"""The smaller dense model of the Top-P paper, as wide as its mixtures of experts.

    python train.py --config=configs/paper/dense_374m.py \
        --config.data.sources='jsonl:redpajama/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 373,867,520 (373.8M in matrices).
Hardware: 6.0 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 100B tokens, 2.35e20 FLOPs, about 170 H100 hours at 40% utilisation (arithmetic).
"""

from configs.paper.shared import paper_run
from dynmoe_jax import config


def get_config():
    """The settings of the run."""
    return paper_run(config.Model(moe=config.MoE(every_n_layers=0)))
