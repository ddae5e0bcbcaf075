r"""Qwen1.5-MoE-A2.7B (Qwen's blog, 2024): four of 60 fine experts, and a shared one with a gate.

    python train.py --config=configs/published/qwen1_5_moe_a2_7b.py \
        --config.data.sources='jsonl:corpus/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 14,315,784,192 (14.31B in matrices), of which a token uses 2,689,173,504.
Hardware: 229.1 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 54B tokens, 9.01e+20 FLOPs, about 630 H100 hours at 40% utilisation (arithmetic).
From the publication: dimensions, biases of queries, keys and values, the rotary base of 1e6 and
the window of 8192 tokens of the release, whose experts were cut from a dense model of 1.8B; here
they begin at random.  It names no tokens, loss or schedule: those are this project's choice
(shared.py), the balance loss that of the port in Hugging Face's transformers.
"""

from configs.published.shared import published_run
from configs.routers import qwen1_5_moe


def get_config():
    """The settings of the run."""
    model = {
        "num_layers": 24,
        "width": 2048,
        "num_heads": 16,
        "num_kv_heads": 16,
        "head_width": 128,
        "vocab_size": 151936,
        "attention_bias": True,
        "rope_theta": 1e6,
        "moe": {"num_experts": 60, "hidden_width": 1408, "shared_hidden_width": 4 * 1408},
    }
    return published_run(qwen1_5_moe.get_config, model, tokens=54e9, seq_len=8192, batch_size=512)
