"""A Top-P MoE language model on a laptop: two CPU cores, no network, minutes.

    python train.py --config=configs/quickstart.py

Trains on the text that every Python installation carries.
"""

import dataclasses

from dynmoe_jax import config


def get_config():
    """The settings of the run."""
    moe = config.MoE(num_experts=8, hidden_width=256, top_p=0.4)
    model = config.Model(
        num_layers=4,
        width=192,
        num_heads=3,
        num_kv_heads=3,
        head_width=64,
        vocab_size=4096,
        max_seq_len=256,
        init_std=0.02,
        moe=moe,
    )
    return config.to_config_dict(
        dataclasses.replace(
            config.Config(),
            model=model,
            data=config.Data(sources="python", seq_len=256, max_megabytes=8.0),
            train=config.Train(steps=300, batch_size=16, log_every_steps=5),
            optimizer=config.Optimizer(learning_rate=3e-3, warmup_steps=30),
            checkpoint=config.Checkpoint(every_steps=100),
        )
    )
