r"""DeepSeekMoE 16B (arXiv 2401.06066): six of 64 fine experts and two shared ones.

    python train.py --config=configs/published/deepseek_moe_16b.py \
        --config.data.sources='jsonl:corpus/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 16,375,728,128 (16.37B in matrices), of which a token uses 2,828,650,496.
Hardware: 262.0 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 2.01T tokens, 3.44e+22 FLOPs, about 24,000 H100 hours at 40% utilisation (arithmetic).
From the paper: dimensions, 106,449 steps of "4.5K" sequences (4608 here) of 4096 tokens, peak
learning rate 4.2e-4 after 2000 steps, AdamW, initial standard deviation 0.006, the balance loss's
coefficient of 1e-3.  The two shared experts are one of twice their width, which computes the same.
The paper multiplies the learning rate by 0.316 after 80% and after 90% of the steps; here it falls
as a cosine to the same tenth.
"""

from configs.published.shared import published_run
from configs.routers import deepseek_moe

SEQ_LEN, BATCH_SIZE, STEPS = 4096, 4608, 106_449


def get_config():
    """The settings of the run."""
    model = {
        "num_layers": 28,
        "width": 2048,
        "num_heads": 16,
        "num_kv_heads": 16,
        "head_width": 128,
        "hidden_width": 10944,
        "vocab_size": 102400,
        "init_std": 0.006,
        "moe": {
            "num_experts": 64,
            "hidden_width": 1408,
            "shared_hidden_width": 2 * 1408,
            "dense_first_layers": 1,
            "top_k": {"k": 6},
        },
    }
    settings = published_run(
        deepseek_moe.get_config,
        model,
        tokens=STEPS * BATCH_SIZE * SEQ_LEN,
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        learning_rate=4.2e-4,
    )
    # The preset's coefficient is that of the paper's 2B model.
    settings.loss.balance.weight = 1e-3
    return settings
