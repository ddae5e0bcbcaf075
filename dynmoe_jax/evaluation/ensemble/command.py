"""Command of an ensemble's evaluation: ``python -m dynmoe_jax.evaluation --ensemble=RUN,RUN``."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain

from dynmoe_jax import config
from dynmoe_jax.console import console
from dynmoe_jax.data import DataError, Tokenizer, for_rows
from dynmoe_jax.data.pipeline import document_batches
from dynmoe_jax.data.sources.registry import check_sources, read_documents
from dynmoe_jax.evaluation.ensemble.page import print_results, write_page
from dynmoe_jax.evaluation.ensemble.results import results_of
from dynmoe_jax.evaluation.ensemble.scores import Member, score
from dynmoe_jax.evaluation.routing.analyze import read_by_domain
from dynmoe_jax.evaluation.window import choose_window
from dynmoe_jax.inference.ensemble.members import (
    ESTIMATE,
    FLAG,
    RECORD,
    check_one_tokenizer,
    check_top_k,
    log_prior_of,
)
from dynmoe_jax.model import variable_shapes
from dynmoe_jax.model.flops import forward_flops
from dynmoe_jax.model.parameters import count_parameters
from dynmoe_jax.runs.compilation import compiled_programs_kept
from dynmoe_jax.runs.disk import disk_errors
from dynmoe_jax.runs.load import OpenedRun, opened_run
from dynmoe_jax.runs.records import to_json, write_atomically
from dynmoe_jax.runs.text import load_text


@dataclasses.dataclass(frozen=True)
class Asked:
    """Evaluation of an ensemble, as it is asked for.

    Attributes:
      members: folders of the runs.
      prior: ``uniform``, ``estimate``, or a file that holds one.
      top_k: members that keep their weight at each token; 0: all.
      text: sources of text; empty: the held-out text of the first run.
      limit: documents of each domain at the most.
      window: tokens read at once; None: as many as the first run was trained on.
      output: folder of the results.
      best: take the checkpoints of the lowest held-out loss.
      settings: other values of free settings of the models.
    """

    members: tuple[Path, ...]
    prior: str
    top_k: int
    text: str
    limit: int | None
    window: int | None
    output: Path
    best: bool
    settings: dict[str, str]


def check(asked: Asked) -> None:
    """Raises ConfigError or DataError for what can be refused before a run is opened."""
    check_top_k(asked.top_k, len(asked.members))
    if asked.prior != ESTIMATE:
        log_prior_of(asked.prior, len(asked.members))
    if asked.text:
        check_sources(config.Data(sources=asked.text))


def evaluate_ensemble(asked: Asked) -> Path:
    """Scores text with every member, one after another, and weighs them token by token.

    Writes ``ensemble.json`` and ``ensemble.html``.

    Returns:
      the path of ``ensemble.json``.

    Raises:
      ConfigError, DataError, CheckpointError, DiskError: with one sentence for the user.
    """
    check(asked)
    log_prior_J = None
    if asked.prior != ESTIMATE:
        log_prior_J = log_prior_of(asked.prior, len(asked.members))
    with contextlib.ExitStack() as opened:
        open_run = functools.partial(opened_run, best=asked.best, settings=asked.settings)
        runs = [opened.enter_context(open_run(folder)) for folder in asked.members]
        _check_runs(runs)
        first = runs[0]
        length = choose_window(asked.window, first.config, first.imported)
        length = min(length, *(run.config.model.max_seq_len for run in runs))
        documents, tokenizer = _documents(asked, first, runs)
        make = functools.partial(_batches, documents, tokenizer, first, length, asked)
        members = [
            Member(model, functools.partial(run.params, variable_shapes(model)))
            for run, model in ((run, run.config.model) for run in runs)
        ]
        bytes_V = tokenizer.token_bytes_V
        with compiled_programs_kept(first.config.train, first.workdir), disk_errors(asked.output):
            scores = score(members, first.config.loss, make, bytes_V)
            if not scores:
                raise DataError(f"{FLAG} finds no text; name some: --ensemble_text=SOURCES.")
            record = _record(asked, runs, length, results_of(scores, log_prior_J, asked.top_k))
            path = asked.output / RECORD
            write_atomically(path, to_json(record, indent=1) + "\n")
            page = write_page(asked.output, "Ensemble", record)
    print_results(record)
    console.print(f" results   {path}", soft_wrap=True, markup=False)
    console.print(f" page      {page}", soft_wrap=True, markup=False)
    return path


def _check_runs(runs: Sequence[OpenedRun]) -> None:
    """Raises ConfigError for models that are no members of one ensemble."""
    check_one_tokenizer(
        [run.workdir for run in runs], [run.tokenizer().fingerprint for run in runs]
    )
    for run in runs:
        if reason := run.config.model.looks_ahead:
            raise config.ConfigError(f"{FLAG} names {run.workdir}: {reason}")


def _documents(asked: Asked, first: OpenedRun, runs: Sequence[OpenedRun]):
    """(documents by domain, tokenizer)."""
    cfg = first.config
    if not asked.text:
        if first.imported:
            raise config.ConfigError(
                f"{FLAG} has no held-out text, as {first.workdir} was not trained here; name some: "
                "--ensemble_text=SOURCES."
            )
        prepared, tokenizer = load_text(cfg, first.workdir, first.checkpoints.position(first.step))
        documents = {domain: prepared.open_heldout(domain) for domain in prepared.domains}
    else:
        tokenizer = first.tokenizer()
        fields = {"text_field": cfg.data.text_field, "domain_field": cfg.data.domain_field}
        data = config.Data(sources=asked.text, **fields)
        documents = read_by_domain(read_documents(data), asked.limit)
    rows = min(run.config.model.vocab_size for run in runs)
    return documents, for_rows(tokenizer, rows)


def _batches(documents, tokenizer: Tokenizer, first: OpenedRun, length: int, asked: Asked):
    """Batches of every domain: of held-out text those that the first run's training evaluates."""
    cfg = first.config
    data = dataclasses.replace(cfg.data, seq_len=length)
    rows = max(1, cfg.train.batch_size // cfg.train.microbatches)
    most = None if asked.text else cfg.evaluation.max_batches

    def first_of(of_domain):
        return grain.MapDataset.source(of_domain)[: asked.limit]

    return {
        domain: document_batches(first_of(of_domain), tokenizer, data, rows, most)
        for domain, of_domain in documents.items()
        if len(of_domain)
    }


def _record(asked: Asked, runs: Sequence[OpenedRun], length: int, results: dict) -> dict[str, Any]:
    """Contents of ``ensemble.json``."""
    models = [run.config.model for run in runs]
    expected = [[m.route.bounds(m.num_experts).expected for m in x.moe_settings] for x in models]
    flops = [forward_flops(x, 1.0, length, rows) for x, rows in zip(models, expected, strict=True)]
    return {
        "members": _names(asked.members),
        "folders": [str(run.workdir.absolute()) for run in runs],
        "steps": [run.step for run in runs],
        "prior_from": asked.prior,
        "top_k": asked.top_k,
        "text": asked.text,
        "window": length,
        "settings": asked.settings,
        "parameters": sum(map(count_parameters, models)),
        "flops_per_token": sum(flops),
        **results,
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of the members for people: those of their folders, whole where two are alike."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
