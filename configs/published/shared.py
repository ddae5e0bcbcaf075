"""Common part of the runs of published models.

Each is a preset of ``configs/routers/`` at the size of the model that was published: the router and
the losses are the preset's, unless the file says otherwise; dimensions are the publication's.

Where a publication does not say how a model was trained, the values are this project's choice: 20
tokens for each parameter that a token uses, 4.2M tokens a step, a peak learning rate of 3e-4 after
2000 steps, an initial standard deviation of 0.02, AdamW (0.9, 0.95) with decay 0.1.  The learning
rate always falls as a cosine to a tenth.  All begin from random parameters.

Hardware: parameters, gradients and AdamW's two moments take 16 bytes per parameter (and up to 4
more while the gradients of a microbatch are added to those of the ones before), shared by the
devices of the ``data`` and ``expert`` axes, like the batch.  Costs in the files are arithmetic, not
measurements: training FLOPs are 6 x the active matrices (without an embedding that is looked up) x
tokens, and causal attention's; device hours are those FLOPs at 40% of 989 TFLOP/s, the bfloat16
peak of one H100.  Backward recomputes element-wise arithmetic alone (``remat="elementwise"``);
where memory is short, ``remat="layer"`` adds a third of the FLOPs, which is not counted there.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from dynmoe_jax import config


def published_run(
    preset: Callable[[], ml_collections.ConfigDict],
    model: Mapping[str, Any],
    *,
    tokens: float,
    seq_len: int,
    batch_size: int,
    learning_rate: float = 3e-4,
    warmup_steps: int = 2000,
) -> ml_collections.ConfigDict:
    """The run that trains a model of the preset's kind.

    Args:
      preset: ``get_config`` of the file in configs/routers.
      model: settings of the model, those of ``moe`` in a mapping of their own.
      tokens: of training.
      seq_len: tokens of one sequence.
      batch_size: sequences per step.
      learning_rate: its peak.
      warmup_steps: before that.
    """
    run = config.to_config_dict(
        config.Config(
            model=config.Model(init_std=0.02, max_seq_len=max(seq_len, 2048), remat="elementwise"),
            data=config.Data(
                # Yours: files with one document per line, {"text": ...}.
                sources="jsonl:corpus/*.jsonl.zst",
                # Yours: a tokenizer with at most as many pieces as the model's vocabulary.
                tokenizer="tokenizer.model",
                seq_len=seq_len,
            ),
            train=config.Train(
                steps=math.ceil(tokens / (seq_len * batch_size)),
                batch_size=batch_size,
                # Fewer devices need more parts: a run that does not fit says how many.
                microbatches=1,
            ),
            optimizer=config.Optimizer(learning_rate=learning_rate, warmup_steps=warmup_steps),
            checkpoint=config.Checkpoint(every_steps=1000),
            evaluation=config.Evaluation(every_steps=5000),
        )
    )
    small = preset()
    run.model.moe, run.loss = small.model.moe, small.loss
    # The preset's is a laptop's.
    run.loss.chunk_tokens = config.Loss().chunk_tokens
    run.model.update(model)
    return run
