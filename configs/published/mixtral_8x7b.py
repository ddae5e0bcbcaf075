r"""Mixtral 8x7B (arXiv 2401.04088): two of eight experts in every layer, nothing dropped.

    python train.py --config=configs/published/mixtral_8x7b.py \
        --config.data.sources='jsonl:corpus/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 46,702,792,704 (46.70B in matrices), of which a token uses 12,879,925,248.
Hardware: 747.2 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 258B tokens, 2.64e+22 FLOPs, about 19,000 H100 hours at 40% utilisation (arithmetic).
From the publication: dimensions, the window of 32768 tokens, the rotary base of 1e6.  It names no
tokens, loss or schedule: those are this project's choice (shared.py), the balance loss that of the
port in Hugging Face's transformers.
"""

from configs.published.shared import published_run
from configs.routers import mixtral


def get_config():
    """The settings of the run."""
    model = {
        "num_layers": 32,
        "width": 4096,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_width": 128,
        "vocab_size": 32000,
        "rope_theta": 1e6,
        "norm_epsilon": 1e-5,
        "moe": {"num_experts": 8, "hidden_width": 14336},
    }
    return published_run(mixtral.get_config, model, tokens=258e9, seq_len=32768, batch_size=128)
