r"""The Top-P paper's mixture of 16 experts with top-2 routing (GShard style).

    python train.py --config=configs/paper/moe_top2.py \
        --config.data.sources='jsonl:redpajama/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 3,488,531,456 (3.488B in matrices), of which a token uses 581,878,784.
Hardware: 55.8 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 100B tokens, 3.59e20 FLOPs, about 250 H100 hours at 40% utilisation (arithmetic).
"""

from configs.paper.shared import paper_run
from dynmoe_jax import config


def get_config():
    """The settings of the run."""
    # Entropy is the dynamic model's loss; a fixed k has no use for it.
    settings = paper_run(
        config.Model(moe=config.MoE(router="top_k", top_k={"k": 2, "renormalize": True}))
    )
    settings.loss.entropy.weight = 0.0
    # GShard (arXiv 2006.16668): the pair's weights sum to one, balance counts first choices.
    settings.loss.balance.counts = "first_choice_only"
    return settings
