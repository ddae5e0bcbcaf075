"""Performs an operation: writes the result, proves what it promises, records where it came from."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

from dynmoe_jax.runs.load import opened_run
from dynmoe_jax.surgery.measuring.measure import Measured, compare
from dynmoe_jax.surgery.measuring.statistics import statistics_of
from dynmoe_jax.surgery.measuring.threshold import fit_threshold
from dynmoe_jax.surgery.report.page import write_page
from dynmoe_jax.surgery.report.provenance import write_record
from dynmoe_jax.surgery.report.record import record_of
from dynmoe_jax.surgery.report.samples import samples_of
from dynmoe_jax.surgery.request import Job, Request, checked
from dynmoe_jax.surgery.storage.parent import files_of
from dynmoe_jax.surgery.storage.target import written_whole
from dynmoe_jax.surgery.storage.write import write_result


class BrokenPromise(Exception):
    """A result does not compute what its operation promises; the message is one sentence."""


def perform(asked: Request) -> dict[str, Any]:
    """Makes the result; its folder is there when all of it is.

    Returns:
      the record that ``surgery.json`` holds.

    Raises:
      ConfigError: something speaks against the request.
      CheckpointError, DiskError: a model cannot be read, or the result cannot be written.
      DataError: the text or a tokenizer cannot be read.
      BrokenPromise: the result differs from its parent by more than the operation promises.
    """
    begun = time.perf_counter()
    with checked(asked) as job, written_whole(job.to) as folder:
        record = _make(job, folder)
        record["seconds"] = time.perf_counter() - begun
        write_record(folder, record)
        write_page(folder, record)
    return record


def _make(job: Job, folder: Path) -> dict[str, Any]:
    """Writes and measures the result in a folder; returns its record."""
    asked, options, tokenizer = job.asked, job.asked.options, job.tokenizer
    tokenizer.save(folder / tokenizer.name_in_run)
    text = job.source.open(folder, tokenizer, job.cfg.model.vocab_size)
    gathered, findings = statistics_of(job, text), {}
    digests = write_result(
        folder,
        asked.operation,
        job.parents,
        job.cfg,
        name=f"surgery: {asked.name}",
        tokenizer=tokenizer.fingerprint,
        seed=options.seed,
        moments=job.moments,
        dtype=options.dtype,
        statistic=gathered.array,
        findings=findings,
    )
    for parent in job.parents:
        parent.forget()
    if wanted := asked.operation.wanted_experts:
        training = text.training(options.tokens, options.seed)
        job = dataclasses.replace(job, cfg=fit_threshold(folder, job.cfg, training, wanted))
    with opened_run(folder, verify=False) as result:
        measured = compare(
            job.parents[0].model, result, text.heldout(options.tokens), tokenizer.token_bytes_V
        )
        _check_promise(job, measured)
        record = record_of(job, digests, files_of(result), measured, text.prepared.content)
        found = {str(layer): findings[layer] for layer in sorted(findings)}
        record |= {"calibration": gathered.record(), "found": found}
        return record | {"samples": samples_of(job, result, text)}


def _check_promise(job: Job, measured: Measured) -> None:
    if job.promise is None or measured.relative_difference <= job.promise:
        return
    if not math.isfinite(measured.all.loss_before):
        raise BrokenPromise(
            f"--from={job.parents[0].folder} has a held-out loss of {measured.all.loss_before}, so "
            f"nothing shows that {job.asked.name} keeps what it computes; nothing was kept."
        )
    raise BrokenPromise(
        f"{job.asked.name} promises logits that differ by at most {job.promise:g} of the largest, "
        f"and they differ by {measured.relative_difference:.3g}; nothing was kept."
    )
