r"""OpenMoE-34B (arXiv 2402.01739): experts beside a dense branch in every fourth layer.

    python train.py --config=configs/published/openmoe_34b.py \
        --config.data.sources='jsonl:corpus/*.jsonl.zst' \
        --config.data.tokenizer=tokenizer.model

Parameters: 34,610,285,568, of which a token uses 7,431,195,648: 6.645B in blocks, and the
embedding, which is the output projection as well.
Hardware: 553.8 GB of state shared by all devices, and activations (more microbatches: fewer).
Cost: 200B tokens, 9.16e+21 FLOPs, about 6,400 H100 hours at 40% utilisation (arithmetic).
From the publication: dimensions, router and losses, the umT5 tokenizer's 256000 pieces, the 200B
tokens of the released checkpoint, 10,000 steps of warm-up.  1024 sequences a step are this
project's choice.
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
        "num_layers": 32,
        "width": 3072,
        "num_heads": 24,
        "num_kv_heads": 24,
        "head_width": 128,
        "hidden_width": 12288,
        "vocab_size": 256000,
        "tie_embeddings": True,
        "moe": {
            "num_experts": 32,
            "hidden_width": 12288,
            "shared_hidden_width": 12288,
            "every_n_layers": 4,
            "layer_offset": 3,
        },
    }
    return published_run(
        openmoe.get_config,
        model,
        tokens=200e9,
        seq_len=2048,
        batch_size=1024,
        warmup_steps=10_000,
    )
