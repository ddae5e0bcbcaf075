"""A Top-P MoE language model on a laptop: two CPU cores, no network, a few minutes.

    python train.py --config=configs/quickstart.py

Trains on the text that every Python installation carries: its sources, its docstrings, the
descriptions and licences of its packages.  Watch the mean experts per token: it starts where the
router knows nothing and falls as the router learns which experts a token needs.
"""

import dataclasses

from dynmoe_jax import config


def get_config():
    """The settings of the run."""
    model = config.Model(
        num_layers=4,
        width=192,
        num_heads=3,
        num_kv_heads=3,
        head_width=64,
        vocab_size=4096,
        max_seq_len=256,
        # Narrower than the paper's model by five, so wider draws: 0.02 learns visibly slower.
        init_std=0.05,
        moe=config.MoE(num_experts=8, hidden_width=256, top_p={"threshold": 0.4}),
    )
    return config.to_config_dict(
        dataclasses.replace(
            config.Config(),
            model=model,
            # The paper's 1e-4 shows after billions of tokens; this run has half a million.
            loss=config.Loss(entropy={"weight": 3e-3}, chunk_tokens=512),
            data=config.Data(sources="python", seq_len=128, max_megabytes=8.0),
            train=config.Train(steps=600, batch_size=8, log_every_steps=10),
            optimizer=config.Optimizer(learning_rate=2e-3, warmup_steps=40),
            checkpoint=config.Checkpoint(every_steps=200),
            evaluation=config.Evaluation(max_batches=40),
        )
    )
