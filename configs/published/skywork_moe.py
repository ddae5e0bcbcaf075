r"""Skywork-MoE (arXiv 2406.06563): two of 16 experts by normalized logits, losses by layer.

    python train.py --config=configs/published/skywork_moe.py \
        --config.data.sources='jsonl:corpus/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 146,356,167,168 (146.4B in matrices), of which a token uses 22,691,308,032.
Hardware: 2,341.7 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 454B tokens, 6.37e+22 FLOPs, about 45,000 H100 hours at 40% utilisation (arithmetic).
From the paper: dimensions (those of Skywork-13B, whose feed-forwards its experts began as; here
they begin at random), normalized logits, the loss and its coefficients.  The capacity factor of
1.25, sequences of 4096 tokens, tokens and schedule are this project's choice (shared.py).
"""

from configs.published.shared import published_run
from configs.routers import skywork


def get_config():
    """The settings of the run."""
    model = {
        "num_layers": 52,
        "width": 4608,
        "num_heads": 36,
        "num_kv_heads": 36,
        "head_width": 128,
        "vocab_size": 65536,
        "moe": {"num_experts": 16, "hidden_width": 12288},
    }
    return published_run(skywork.get_config, model, tokens=454e9, seq_len=4096, batch_size=1024)
