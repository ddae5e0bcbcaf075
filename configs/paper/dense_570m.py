r"""The wider dense model of the Top-P paper, the match of top-2's active parameters.

    python train.py --config=configs/paper/dense_570m.py \
        --config.data.sources='jsonl:redpajama/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 569,570,560 (569.5M in matrices).
Hardware: 9.1 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 100B tokens, 3.55e20 FLOPs, about 250 H100 hours at 40% utilisation (arithmetic).
"""

from configs.paper.shared import paper_run
from dynmoe_jax import config


def get_config():
    """The settings of the run."""
    model = config.Model(
        width=1280,
        num_heads=20,
        num_kv_heads=20,
        hidden_width=3584,
        moe=config.MoE(every_n_layers=0),
    )
    return paper_run(model)
