"""A run for :mod:`benchmarks.kill_campaign`: tiny, and it saves, evaluates and logs all the time.

Not meant to be started by hand: the campaign names the sources.
"""

import dataclasses

from dynmoe_jax import config


def get_config():
    """Two layers, 120 short steps, a checkpoint every 6."""
    model = config.Model(
        num_layers=2,
        width=32,
        num_heads=2,
        num_kv_heads=2,
        head_width=16,
        vocab_size=512,
        max_seq_len=64,
        init_std=0.1,
        moe=config.MoE(num_experts=4, hidden_width=32, top_p={"threshold": 0.4}),
    )
    return config.to_config_dict(
        dataclasses.replace(
            config.Config(),
            model=model,
            data=config.Data(seq_len=64, heldout_fraction=0.1, tokenizer_megabytes=1.0),
            train=config.Train(steps=120, batch_size=8, log_every_steps=1),
            optimizer=config.Optimizer(learning_rate=1e-3, warmup_steps=10),
            checkpoint=config.Checkpoint(every_steps=6, keep=2, keep_best=1),
            evaluation=config.Evaluation(every_steps=18, max_batches=4, sample_tokens=8),
        )
    )
