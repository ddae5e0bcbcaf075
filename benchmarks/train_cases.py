"""What `benchmarks.train_step` measures: one shape, trained densely and by several routers.

Axis legend: B batch, L positions, V vocabulary.
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from dynmoe_jax import config


@dataclasses.dataclass(frozen=True)
class Preset:
    """Shape of a model and of its batch, for every peer alike.

    Attributes:
      model: its routers are replaced by those of the cases.
      batch_size: B.
      seq_len: L.
      microbatches: parts of the batch whose gradients are added up.
    """

    model: config.Model
    batch_size: int
    seq_len: int
    microbatches: int = 1


PRESETS = {
    "cpu": Preset(
        config.Model(
            num_layers=4,
            width=512,
            num_heads=8,
            num_kv_heads=8,
            hidden_width=1408,
            vocab_size=8192,
            moe=config.MoE(num_experts=16, hidden_width=1408),
        ),
        batch_size=8,
        seq_len=512,
    ),
    "tiny": Preset(
        config.Model(
            num_layers=2,
            width=32,
            num_heads=2,
            num_kv_heads=2,
            head_width=16,
            hidden_width=32,
            vocab_size=64,
            init_std=0.05,
            moe=config.MoE(num_experts=8, hidden_width=32),
        ),
        batch_size=4,
        seq_len=32,
    ),
    # The paper's model of 3.5B parameters.  14 sequences fit into an H100 if backward computes
    # element-wise arithmetic, gate and up again (docs/measurements.md: h100-step-memory).  Of more,
    # XLA makes room by computing arrays several times, and sums over microbatches take room too.
    "paper": Preset(
        config.Model(remat="elementwise", unroll=24, moe=config.MoE(saved_rows_per_token=0.0)),
        batch_size=14,
        seq_len=2048,
    ),
}


def preset_of(values: dict) -> Preset:
    """A preset from what :func:`dataclasses.asdict` made of it."""
    model = config.Model(**values["model"] | {"moe": config.MoE(**values["model"]["moe"])})
    return Preset(**values | {"model": model})


MEAN = 2.0
"""Experts per token that top-p is sharpened to."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to train the shape.

    Attributes:
      moe: its routers; ``every_n_layers=0`` makes it dense.
      mean: experts per token that the routers are sharpened to; 0 leaves them as they are drawn.
    """

    moe: config.MoE
    mean: float = 0.0


def cases(preset: Preset) -> dict[str, Case]:
    """Dense (one expert's width), top-1, top-2, and top-p at the same mean as top-2."""
    moe = preset.model.moe
    return {
        "dense": Case(dataclasses.replace(moe, every_n_layers=0)),
        "top_1": Case(dataclasses.replace(moe, router="top_k", top_k={"k": 1})),
        "top_2": Case(dataclasses.replace(moe, router="top_k", top_k={"k": 2})),
        "top_p_2": Case(dataclasses.replace(moe, router="top_p"), mean=MEAN),
    }


def settings(preset: Preset, case: Case) -> config.Config:
    """The run of a case.  It learns next to nothing: a drifting router would change the cost."""
    model = dataclasses.replace(preset.model, moe=case.moe)
    return config.Config(
        model=model,
        data=config.Data(seq_len=preset.seq_len),
        train=config.Train(batch_size=preset.batch_size, microbatches=preset.microbatches),
        optimizer=config.Optimizer(learning_rate=1e-9, warmup_steps=0),
    )


def draw_tokens(preset: Preset) -> Int[np.ndarray, "B L1"]:
    """L + 1 tokens for each sequence: inputs, and the same moved by one as targets."""
    shape = (preset.batch_size, preset.seq_len + 1)
    return np.random.default_rng(0).integers(0, preset.model.vocab_size, shape, np.int32)
