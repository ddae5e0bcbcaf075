"""End of a run: a sample, the table, the report."""

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.cluster import agreement
from dynmoe_jax.console import console
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.evaluation.report.page import FILE_NAME as REPORT
from dynmoe_jax.evaluation.report.page import write_report
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.inference.writer import Writer
from dynmoe_jax.model import decoder_structure
from dynmoe_jax.model.parameters import active_parameters, count_parameters
from dynmoe_jax.runs.checkpoint import FOLDER as CHECKPOINTS
from dynmoe_jax.runs.metrics_file import FILE_NAME as METRICS
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import FILE_NAME as SUMMARY
from dynmoe_jax.runs.summary import HeldOut, Sample, Summary, write_summary
from dynmoe_jax.training.log.seconds import Seconds
from dynmoe_jax.training.log.summary_tables import print_summary

NEED_CAUSALITY = ("sample", "generation", "evaluation")
"""What a run does without where a router looks at later tokens also at inference."""


def sample(cfg: config.Config, params: nnx.State, tokenizer: Tokenizer) -> Sample:
    """Continues ``evaluation.prompt``."""
    settings = cfg.evaluation
    length = 1 + len(tokenizer.encode(settings.prompt))
    # One token at least: a long prompt is no reason to lose what the run has to say.
    room = max(cfg.model.max_seq_len, length + 1)
    sampling = Sampling(
        max_tokens=min(settings.sample_tokens, room - length),
        temperature=settings.temperature,
        seed=cfg.seed,
    )
    decoder = nnx.merge(decoder_structure(cfg.model), params)
    # A run that only just fits must not end for want of memory for another copy of its layers.
    writer = Writer(decoder, tokenizer, sampling, room=room, copy_layers=False)
    written = writer.write([settings.prompt])[0][0]
    pieces = list(zip(written.pieces, written.experts_n, strict=False))
    return Sample(settings.prompt, written.text, pieces)


def finish_run(
    cfg: config.Config,
    workdir: Path,
    step: int,
    params: nnx.State,
    heldout: HeldOut,
    tokenizer: Tokenizer,
    seconds: Seconds,
    routing: dict[str, Any] | None = None,
) -> None:
    """Samples, writes ``summary.json`` and the report, and prints the closing table.

    All processes sample, process 0 does the rest.

    Args:
      cfg: all settings.
      workdir: the run's folder.
      step: steps done.
      params: of the model.
      heldout: its evaluation.
      tokenizer: of the text.
      seconds: of the run so far.
      routing: analysis of the held-out text, if there is one.
    """
    reason, written = cfg.model.looks_ahead, None
    if not reason and cfg.evaluation.sample_tokens:
        with seconds.of("evaluation"):
            written = sample(cfg, params, tokenizer)
    if not agreement.is_first():
        return
    metrics = read_metrics(workdir)
    paths = {
        "checkpoints": CHECKPOINTS,
        "tokenizer": tokenizer.name_in_run,
        "metrics": METRICS,
        "summary": SUMMARY,
    }
    if cfg.evaluation.report:
        paths["report"] = REPORT
    if cfg.logging.tensorboard:
        paths["tensorboard"] = "tensorboard"
    summary = Summary(
        complete=step >= cfg.train.steps,
        step=step,
        steps=cfg.train.steps,
        parameters=count_parameters(cfg.model),
        active_parameters=active_parameters(cfg.model, heldout.experts_per_token_by_layer),
        heldout=heldout,
        tokens_per_second=float(np.median([m["tokens_per_second"] for m in metrics])),
        mfu=float(np.median([m["mfu"] for m in metrics])),
        seconds=seconds.by_activity(),
        sample=written,
        paths=paths,
        left_out=dict.fromkeys(NEED_CAUSALITY, reason) if reason else {},
    )
    if cfg.evaluation.report:
        write_report(workdir, cfg, metrics, summary, routing)
    write_summary(workdir, summary)
    console.print()
    print_summary(summary, workdir)
