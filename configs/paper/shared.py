"""What the five runs of "Harder Tasks Need More Experts" (arXiv 2403.07652) share.

From the paper: 100B tokens of RedPajama, Llama-2's tokenizer of 32000 pieces, AdamW, initial
standard deviation 0.006, the loss weights alpha = 1e-2 and beta = 1e-4 (which routers declare, so
that ``config.loss`` need not).  Batch size, learning rate and schedule are this project's choice.

Hardware: parameters, gradients and AdamW's two moments take 16 bytes per parameter (and up to 4
more while the gradients of a microbatch are added to those of the ones before), shared by the
devices of the ``data`` and ``expert`` axes, like the batch.  Costs in the five files are
arithmetic, not measurements: training FLOPs are 6 x the active matrices (without the embedding,
which is looked up) x tokens, plus 6 N L D per token for causal attention; device hours are those
FLOPs at 40% of 989 TFLOP/s, the bfloat16 peak of one H100.  Backward recomputes element-wise
arithmetic alone (``remat="elementwise"``); where memory is short, ``remat="layer"`` adds a third of
the FLOPs, which is not counted there.
"""

import dataclasses
import math

import ml_collections

from dynmoe_jax import config

TRAINING_TOKENS = 100e9
SEQ_LEN = 2048
BATCH_SIZE = 1024
"""Sequences per step: 2.1M tokens."""

STEPS = math.ceil(TRAINING_TOKENS / (SEQ_LEN * BATCH_SIZE))


def paper_run(model: config.Model) -> ml_collections.ConfigDict:
    """The run that trains ``model`` as the paper's models were trained."""
    run = config.Config(
        model=dataclasses.replace(model, remat="elementwise"),
        data=config.Data(
            # Yours: files with one document per line, {"text": ...}, such as RedPajama's.  A
            # document's domain is its file's name unless a field "domain" says otherwise.
            sources="jsonl:redpajama/*.jsonl.zst",
            # Yours: Llama-2's SentencePiece model, or another one of 32000 pieces.
            tokenizer="redpajama/tokenizer.model",
            seq_len=SEQ_LEN,
        ),
        train=config.Train(
            steps=STEPS,
            batch_size=BATCH_SIZE,
            # Enough devices for 1024 sequences at a time, such as 64 v5p; fewer need more parts:
            # a run that does not fit says how many.
            microbatches=1,
        ),
        optimizer=config.Optimizer(learning_rate=3e-4, warmup_steps=2000),
        checkpoint=config.Checkpoint(every_steps=1000),
        evaluation=config.Evaluation(every_steps=5000),
    )
    return config.to_config_dict(run)
