r"""OpenMoE-8B (arXiv 2402.01739): experts beside a dense branch in every sixth layer.

    python train.py --config=configs/published/openmoe_8b.py \
        --config.data.sources='jsonl:corpus/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 8,779,040,768, of which a token uses 2,739,243,008: 2.215B in blocks, and the
embedding, which is the output projection as well.
Hardware: 140.5 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 1.10T tokens, 1.91e+22 FLOPs, about 13,000 H100 hours at 40% utilisation (arithmetic).
From the publication: dimensions, router and losses, the umT5 tokenizer's 256000 pieces, 1.1T tokens
(390,000 steps for 780B: 1024 sequences of 2048 each, or nearly), 10,000 steps of warm-up.
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
        "num_layers": 24,
        "width": 2048,
        "num_heads": 24,
        "num_kv_heads": 24,
        "head_width": 128,
        "hidden_width": 8192,
        "vocab_size": 256000,
        "tie_embeddings": True,
        "moe": {
            "num_experts": 32,
            "hidden_width": 8192,
            "shared_hidden_width": 8192,
            "every_n_layers": 6,
            "layer_offset": 5,
        },
    }
    return published_run(
        openmoe.get_config,
        model,
        tokens=1.1e12,
        seq_len=2048,
        batch_size=1024,
        warmup_steps=10_000,
    )
