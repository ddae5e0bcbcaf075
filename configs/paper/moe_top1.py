r"""The Top-P paper's mixture of 16 experts with top-1 routing (Switch).

    python train.py --config=configs/paper/moe_top1.py \
        --config.data.sources='jsonl:redpajama/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 3,488,531,456 (3.488B in matrices), of which a token uses 374,260,736.
Hardware: 55.8 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 100B tokens, 2.35e20 FLOPs, about 170 H100 hours at 40% utilisation (arithmetic).
"""

from configs.paper.shared import paper_run
from dynmoe_jax import config


def get_config():
    """The settings of the run."""
    # Entropy is the dynamic model's loss; a fixed k has no use for it.
    settings = paper_run(config.Model(moe=config.MoE(router="top_k", top_k={"k": 1})))
    settings.loss.entropy.weight = 0.0
    return settings
