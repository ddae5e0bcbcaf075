"""BlockFFN at the quickstart's size: narrow experts, as many as a token has positive logits for.

    python train.py --config=configs/routers/block_ffn.py --workdir=runs/block_ffn

BlockFFN (arXiv 2507.08771): gates are RMSNorm(ReLU(x W)), experts have two matrices with SiLU
between them, and two losses make neighbors and chunks of 64 tokens share experts.  Expect a start
near 16 of 32 experts per token; both losses bring it down.  The coefficients are this project's.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router = "block_ffn"
    # As many hidden units in all as the quickstart's 8 experts of 256.
    moe.experts, moe.num_experts, moe.hidden_width = "silu", 32, 64
    moe.block_ffn.experts_per_token = 8.0
    settings.loss.entropy.weight = 0.0
    return settings
