r"""OpenMoE-Base (arXiv 2402.01739): experts beside a dense branch in every fourth layer.

    python train.py --config=configs/published/openmoe_base.py \
        --config.data.sources='jsonl:corpus/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 649,648,896, of which a token uses 352,377,600: 155.8M in blocks, and the
embedding, which is the output projection as well.
Hardware: 10.4 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 128B tokens, 2.85e+20 FLOPs, about 200 H100 hours at 40% utilisation (arithmetic).
From the publication: dimensions, router and losses, the umT5 tokenizer's 256000 pieces, 128B tokens
(500,000 steps: 128 sequences of 2048 each, or nearly), 10,000 steps of warm-up.
Not here: GEGLU, which ST-MoE's recipe names (SwiGLU, which OpenMoE's repository names, has
as many parameters); the UL2 objective (this run predicts the next token, as OpenMoE-8B did after
780B tokens); Adafactor with its inverse square root of steps (AdamW and a cosine, 3e-4); and a
capacity, so that nothing is dropped.
"""

from configs.published.shared import published_run
from configs.routers import openmoe


def get_config():
    """The settings of the run."""
    model = {
        "num_layers": 12,
        "width": 768,
        "num_heads": 12,
        "num_kv_heads": 12,
        "head_width": 64,
        "hidden_width": 3072,
        "vocab_size": 256000,
        "tie_embeddings": True,
        "moe": {
            "num_experts": 16,
            "hidden_width": 3072,
            "shared_hidden_width": 3072,
            "every_n_layers": 4,
            "layer_offset": 3,
        },
    }
    return published_run(
        openmoe.get_config,
        model,
        tokens=128e9,
        seq_len=2048,
        batch_size=128,
        warmup_steps=10_000,
    )
