"""Performs an operation: writes the result, proves what it promises, records where it came from."""

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.runs.begun import make_folder
from dynmoe_jax.runs.load import opened_run
from dynmoe_jax.surgery.measure import Measured, compare
from dynmoe_jax.surgery.operation import settings_of
from dynmoe_jax.surgery.parent import Parent
from dynmoe_jax.surgery.provenance import versions, write_record
from dynmoe_jax.surgery.request import Job, Request, checked
from dynmoe_jax.surgery.size import size_of
from dynmoe_jax.surgery.threshold import fit_threshold
from dynmoe_jax.surgery.write import write_result


class BrokenPromise(Exception):
    """A result does not compute what its operation promises; the message is one sentence."""


def perform(asked: Request) -> dict[str, Any]:
    """Makes the result; its folder is there when all of it is.

    Returns:
      the record that ``surgery.json`` holds.

    Raises:
      ConfigError: something speaks against the request.
      CheckpointError: a model cannot be read, or the result cannot be written.
      DataError: the text or a tokenizer cannot be read.
      BrokenPromise: the result differs from its parent by more than the operation promises.
    """
    begun = time.perf_counter()
    with checked(asked) as job:
        unfinished = asked.to.with_name(asked.to.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make_folder(unfinished)
        try:
            record = _make(job, unfinished)
            record["seconds"] = time.perf_counter() - begun
            write_record(unfinished, record)
            if asked.to.exists():
                asked.to.rmdir()
            unfinished.replace(asked.to)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return record


def _make(job: Job, folder: Path) -> dict[str, Any]:
    """Writes and measures the result in a folder; returns its record."""
    asked, options = job.asked, job.asked.options
    tokenizer = _tokenizer(job.parents)
    tokenizer.save(folder / tokenizer.name_in_run)
    digest = write_result(
        folder,
        asked.operation,
        job.parents,
        job.cfg,
        name=f"surgery: {asked.name}",
        tokenizer=tokenizer.fingerprint,
        seed=options.seed,
        moments=job.moments,
        dtype=options.dtype,
    )
    text = job.source.open(folder, tokenizer, job.cfg.model.vocab_size)
    if wanted := asked.operation.wanted_experts:
        training = text.training(options.tokens, options.seed)
        job = dataclasses.replace(job, cfg=fit_threshold(folder, job.cfg, training, wanted))
    with opened_run(folder) as result:
        measured = compare(
            job.parents[0].model, result, text.heldout(options.tokens), tokenizer.token_bytes_V
        )
    _check_promise(job, measured)
    return _record(job, digest, measured, text.prepared.content)


def _tokenizer(parents: Sequence[Parent]) -> Tokenizer:
    """The tokenizer that all parents share."""
    found = [parent.tokenizer() for parent in parents]
    for parent, tokenizer in zip(parents, found, strict=True):
        if tokenizer is None:
            raise config.ConfigError(
                f"--from={parent.folder} holds no tokenizer; put the model's own one there."
            )
        if tokenizer.fingerprint != found[0].fingerprint:
            raise config.ConfigError(
                f"--from={parent.folder} has another tokenizer than --from={parents[0].folder}; "
                "give models that share one."
            )
    return found[0]


def _check_promise(job: Job, measured: Measured) -> None:
    if job.promise is None or measured.relative_difference <= job.promise:
        return
    raise BrokenPromise(
        f"{job.asked.name} promises logits that differ by at most {job.promise:g} of the largest, "
        f"and they differ by {measured.relative_difference:.3g}; nothing was kept."
    )


def _record(job: Job, digest: str, measured: Measured, content: str) -> dict[str, Any]:
    asked, first = job.asked, job.parents[0]
    sides = {"before": size_of(first.config), "after": size_of(job.cfg, asked.options.dtype)}
    found = {side: dataclasses.asdict(size) for side, size in sides.items()}
    for side, load in (("before", measured.load_before), ("after", measured.load_after)):
        total = [sum(shares) for shares in load.values()]
        found[side] |= {
            "heldout_loss": getattr(measured.all, f"loss_{side}"),
            "heldout_bits_per_byte": getattr(measured.all, f"bits_{side}"),
            "experts_per_token": sum(total) / len(total) if total else math.nan,
            "load": {str(layer): shares for layer, shares in load.items()},
        }
    return {
        "operation": asked.name,
        "settings": dict(settings_of(asked.operation)),
        "options": dataclasses.asdict(asked.options),
        "parents": [{"folder": str(p.folder), "digest": p.digest} for p in job.parents],
        "digest": digest,
        "exact": {"promised": job.promise, "measured": measured.relative_difference},
        **found,
        "compared": {
            "all": dataclasses.asdict(measured.all),
            "domains": {name: dataclasses.asdict(x) for name, x in measured.domains.items()},
            "largest_logit": measured.largest_logit,
        },
        "data": {"sources": job.cfg.data.sources, "content": content},
        "moments": "carried" if job.moments else "none",
        "remarks": asked.operation.remarks([parent.config for parent in job.parents]),
        "history": first.history,
        "versions": versions(),
    }
