r"""The Top-P paper's mixture of 16 experts with dynamic routing, p = 0.4: its main model.

    python train.py --config=configs/paper/moe_dynamic.py \
        --config.data.sources='jsonl:redpajama/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 3,488,531,456 (3.488B in matrices), of which a token uses 532.1M at the paper's mean of
1.76 experts (374.3M at one, 581.9M at two).
Hardware: 55.8 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 100B tokens, 3.30e20 FLOPs at 1.76 experts, about 230 H100 hours at 40% utilisation
(arithmetic); more early on: a fresh router is flat, and a token then uses up to 7 experts.
The paper reports a mean below two experts after about 60B tokens, and 1.76 at inference.
"""

from configs.paper.shared import paper_run
from dynmoe_jax import config


def get_config():
    """The settings of the run."""
    return paper_run(config.Model(moe=config.MoE(router="top_p")))
