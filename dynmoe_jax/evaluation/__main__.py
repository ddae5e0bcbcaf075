"""Evaluates a run: tasks of lm-evaluation-harness, perplexity of any text, analysis of routing; or
an ensemble of runs.

    python -m dynmoe_jax.evaluation --workdir=runs/mine \\
        --tasks=piqa,hellaswag,arc_easy,commonsense_qa,bbh --data_dir=items
    python -m dynmoe_jax.evaluation --workdir=runs/mine --perplexity='text:notes/*.md'
    python -m dynmoe_jax.evaluation --workdir=runs/mine --instructions='instructions:own/*.jsonl'
    python -m dynmoe_jax.evaluation --workdir=runs/mine --routing
    python -m dynmoe_jax.evaluation --ensemble=runs/code,runs/prose

Tasks need the extra: pip install 'dynmoe_jax[eval]'.  Results are in WORKDIR/evaluation, unless
--output names another folder.  --config.model.NAME=VALUE changes what is no part of the model, such
as the experts per token of a router that leaves them open.  An evaluation that is stopped goes on
with the same command.
"""

import argparse
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from dynmoe_jax import config
from dynmoe_jax.command_line import exit_code, free_settings
from dynmoe_jax.console import console, warn
from dynmoe_jax.data import DataError, Tokenizer, for_rows
from dynmoe_jax.data.preparation.prepare import template_for
from dynmoe_jax.data.sources.registry import check_sources, read_documents
from dynmoe_jax.data.tokenizers.endings import ends_of
from dynmoe_jax.evaluation import perplexity, responses
from dynmoe_jax.evaluation.ensemble.command import check as check_ensemble
from dynmoe_jax.evaluation.ensemble.command import evaluate_ensemble
from dynmoe_jax.evaluation.ensemble.flags import (
    FOLDER,
    add_flags,
    check_no_ensemble,
    ensemble_of,
)
from dynmoe_jax.evaluation.harness import answers
from dynmoe_jax.evaluation.routing.analyze import analyze, packed, read_by_domain
from dynmoe_jax.evaluation.routing.page import print_analysis, write_analysis
from dynmoe_jax.evaluation.routing.record import FILE_NAME as ROUTING_RECORD
from dynmoe_jax.evaluation.scoring.scoring import Scorer
from dynmoe_jax.evaluation.scoring.tree_writing import TreeWriter
from dynmoe_jax.evaluation.window import choose_window
from dynmoe_jax.inference.transforms import keeping
from dynmoe_jax.model import Decoder, variable_shapes
from dynmoe_jax.runs.compilation import compiled_programs_kept
from dynmoe_jax.runs.disk import DiskError, disk_errors
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.load import OpenedRun, opened_run
from dynmoe_jax.runs.records import to_json, write_atomically
from dynmoe_jax.runs.text import load_text

BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_OTHER = 1 << 15
HELD_OUT = "held out"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise config.ConfigError(f"{message}; see --help.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = _Parser(
        prog="python -m dynmoe_jax.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--workdir", type=Path, help="folder of the run")
    add("--tasks", default="", help="comma-separated, as the harness calls them")
    add("--data_dir", type=Path, help="folder with TASK.jsonl[.gz] files; without it, the network")
    add("--limit", type=int, help="items of each task, or documents of each domain, at the most")
    add("--num_fewshot", type=int, help="examples before each question; a task's own by default")
    add("--perplexity", default="", metavar="SOURCES", help="as config.data.sources")
    shown = "score responses of conversations, such as instructions:GLOB"
    add("--instructions", default="", metavar="SOURCES", help=shown)
    add(
        "--routing",
        nargs="?",
        const=HELD_OUT,
        metavar="SOURCES",
        help="analyze who uses how many experts and which ones: of the run's held-out text, or of "
        "SOURCES as in config.data.sources",
    )
    add_flags(add)
    add(
        "--window",
        type=int,
        help="tokens read at once; by default what the run was trained on, "
        "or all that an imported model has room for",
    )
    add("--stride", type=int, help="tokens between windows of a document; half a window by default")
    add("--batch_tokens", type=int, help="tokens of one call; 2048 on a CPU, 32768 elsewhere")
    add("--max_new_tokens", type=int, default=256, help="tokens written at the most")
    add(
        "--begin_with_bos",
        action=argparse.BooleanOptionalAction,
        help="put BOS before the texts of tasks; by default as the tokenizer says",
    )
    add("--output", type=Path, help="folder of the results; WORKDIR/evaluation by default")
    add("--best", action="store_true", help="the checkpoint of the lowest held-out loss")
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use answers that an earlier evaluation has left",
    )
    return made


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The request of a command line, with the settings that it changes.

    Raises:
      ConfigError: a flag is unknown, its value cannot be, or a setting has no value.
    """
    settings, arguments = free_settings(arguments)
    asked = parser().parse_args(arguments)
    asked.settings = settings
    for name in ("workdir", "data_dir", "output"):
        if getattr(asked, name) is not None:
            setattr(asked, name, getattr(asked, name).expanduser())
    return asked


def evaluate(asked: argparse.Namespace) -> int:
    """The command.

    Raises:
      ConfigError, DataError, CheckpointError, DiskError: with one sentence for the user.
    """
    names = [name.strip() for name in asked.tasks.split(",") if name.strip()]
    tasks = _check(asked, names)
    if asked.ensemble:
        evaluate_ensemble(ensemble_of(asked))
        return 0
    with opened_run(asked.workdir, best=asked.best, settings=asked.settings) as run:
        cfg, imported = run.config, run.imported
        if cfg.model.looks_ahead and (names or asked.perplexity or asked.instructions):
            raise config.ConfigError(cfg.model.looks_ahead)
        if asked.routing:
            _routing(asked, run)
        if not names and not asked.perplexity and not asked.instructions:
            return 0
        tokenizer = for_rows(run.tokenizer(), cfg.model.vocab_size)
        decoder = without_budget(run.decoder())
    window = choose_window(asked.window, cfg, imported)
    stride = asked.stride or max(1, window // 2)
    perplexity.check_stride(window, stride)
    scorer = Scorer(decoder, asked.batch_tokens or _batch_tokens(), window)
    folder = asked.output or asked.workdir / FOLDER
    kept = answers.AnswerFile(
        folder / answers.FILE_NAME,
        answers.fingerprint(decoder, tokenizer.fingerprint),
        asked.resume,
    )
    with compiled_programs_kept(cfg.train, asked.workdir), disk_errors(folder):
        if asked.perplexity:
            _perplexity(asked, cfg, scorer, tokenizer, kept, folder, window, stride)
        if asked.instructions:
            _instructions(asked, cfg, scorer, tokenizer, kept, folder)
        if tasks:
            _tasks(asked, tasks, decoder, scorer, tokenizer, kept, folder)
    kept.close()
    return 0


def _batch_tokens() -> int:
    """Tokens of one call, unless --batch_tokens says."""
    return BATCH_TOKENS.get(jax.default_backend(), BATCH_TOKENS_OTHER)


def _routing(asked: argparse.Namespace, run: OpenedRun) -> None:
    """Analyzes the routing of the run's model, as it is, budgets of experts included."""
    cfg = run.config
    if not cfg.model.moe_settings:
        raise config.ConfigError("--routing analyzes experts, and this model has none.")
    if run.imported and asked.routing == HELD_OUT:
        raise config.ConfigError(
            "--routing has no held-out text of an imported model; name some: --routing=SOURCES."
        )
    length = choose_window(asked.window, cfg, run.imported)
    if asked.routing == HELD_OUT:
        prepared, tokenizer = load_text(cfg, run.workdir, run.checkpoints.position(run.step))
        documents = {domain: prepared.open_heldout(domain) for domain in prepared.domains}
    else:
        tokenizer = for_rows(run.tokenizer(), cfg.model.vocab_size)
        documents = read_by_domain(read_documents(_sources(asked.routing, cfg)), asked.limit)
    if not documents:
        raise DataError(f"--routing={asked.routing!r} gives no document; name another source.")
    # As many rows as in training, where tokens of a batch may take each other's places.
    trained = cfg.train.batch_size // cfg.train.microbatches
    rows = max(1, (asked.batch_tokens or _batch_tokens()) // length)
    rows = rows if run.imported or asked.batch_tokens else min(rows, trained)
    shapes = variable_shapes(cfg.model)
    opened = [
        dataclasses.replace(run, step=step)
        for step in run.checkpoints.steps()
        if step == run.step or (step < run.step and _model(run, step) == cfg.model)
    ]
    folder = asked.output or asked.workdir / FOLDER
    with compiled_programs_kept(cfg.train, asked.workdir), disk_errors(folder):
        record = analyze(
            cfg.model,
            cfg.loss,
            checkpoints=[(each.step, functools.partial(each.params, shapes)) for each in opened],
            batches=lambda: packed(documents, tokenizer, length, rows, asked.limit),
            length=length,
            tokenizer=tokenizer,
        )
        title = f"{asked.workdir.resolve().name} – routing"
        page = write_analysis(folder, title, record)
    for sentence in record["left_out"]:
        warn(sentence)
    print_analysis(record)
    console.print(f" results   {folder / ROUTING_RECORD}", soft_wrap=True, markup=False)
    console.print(f" page      {page}", soft_wrap=True, markup=False)


def _model(run: OpenedRun, step: int) -> config.Model:
    """The model of a checkpoint of a run, which may have grown since."""
    return config.settings_at(run.checkpoints.config(step), step).model


def _sources(sources: str, cfg: config.Config) -> config.Data:
    """Settings of sources, whose records have the fields of the run's own."""
    fields = {"text_field": cfg.data.text_field, "domain_field": cfg.data.domain_field}
    return config.Data(sources=sources, **fields)


def without_budget(decoder: Decoder) -> Decoder:
    """The decoder without what makes tokens of a batch affect each other, dropped choices."""
    backend = decoder.config.moe.backend
    exact = keeping(
        decoder,
        lambda transform: transform.group == "token",
        backend="auto" if backend == "capacity" else backend,
    )
    if exact is not decoder:
        warn("The run drops choices of experts over its budget; here none are dropped.")
    return exact


def _check(asked: argparse.Namespace, names: list[str]) -> dict:
    """The tasks, ready; raises ConfigError for what can be refused before anything is loaded."""
    for name in ("limit", "num_fewshot", "window", "stride", "batch_tokens", "max_new_tokens"):
        value, least = getattr(asked, name), 0 if name == "num_fewshot" else 1
        if value is not None and value < least:
            raise config.ConfigError(f"--{name}={value} must be at least {least}.")
    if asked.ensemble:
        check_ensemble(ensemble_of(asked))
        return {}
    check_no_ensemble(asked)
    if asked.workdir is None:
        raise config.ConfigError("--workdir is missing; name the folder of a run.")
    if not (names or asked.perplexity or asked.routing or asked.instructions):
        raise config.ConfigError(
            "There is nothing to evaluate; name --tasks, --perplexity, --instructions or --routing."
        )
    if asked.instructions:
        check_sources(config.Data(sources=asked.instructions))
    if asked.routing and asked.routing != HELD_OUT:
        check_sources(config.Data(sources=asked.routing))
    if asked.perplexity:
        check_sources(config.Data(sources=asked.perplexity))
    if not names:
        return {}
    if importlib.util.find_spec("lm_eval") is None:
        raise config.ConfigError(
            "--tasks needs lm-evaluation-harness; install it: pip install 'dynmoe_jax[eval]'."
        )
    from dynmoe_jax.evaluation.harness.local_tasks import announce_aliases, load_tasks

    announce_aliases(names)
    return load_tasks(names, asked.data_dir)


def _perplexity(asked, cfg, scorer, tokenizer, kept, folder, window, stride) -> None:
    found = perplexity.measure(
        read_documents(_sources(asked.perplexity, cfg)),
        scorer,
        tokenizer,
        kept,
        stride=stride,
        limit=asked.limit,
    )
    if not found:
        raise DataError(
            f"--perplexity={asked.perplexity!r} gives no document; name another source."
        )
    perplexity.print_perplexity(found)
    path = folder / perplexity.FILE_NAME
    record = {"sources": asked.perplexity, "settings": asked.settings}
    record |= perplexity.to_record(found, window, stride)
    write_atomically(path, to_json(record, indent=2) + "\n")
    console.print(f" results   {path}", soft_wrap=True, markup=False)


def _instructions(asked, cfg, scorer, tokenizer, kept, folder) -> None:
    data = _sources(asked.instructions, cfg)
    documents = read_documents(data, template_for(data, tokenizer))
    found = responses.measure(documents, scorer, tokenizer, kept, limit=asked.limit)
    record = {"sources": asked.instructions, "settings": asked.settings}
    record |= responses.to_record(found)
    responses.print_scores(found)
    path = folder / responses.FILE_NAME
    write_atomically(path, to_json(record, indent=2) + "\n")
    console.print(f" results   {path}", soft_wrap=True, markup=False)


def _tasks(
    asked, tasks, decoder: Decoder, scorer: Scorer, tokenizer: Tokenizer, kept, folder
) -> None:
    from dynmoe_jax.evaluation.harness.run_tasks import run_tasks

    writer = TreeWriter(
        decoder,
        scorer.batch_tokens,
        tokenizer.vocab_size,
        tokenizer.eos_id,
        ends_of(tokenizer),
    )
    run_tasks(
        tasks,
        scorer,
        writer,
        tokenizer,
        kept,
        folder,
        title=f"{asked.workdir.resolve().name} – tasks",
        limit=asked.limit,
        num_fewshot=asked.num_fewshot,
        max_new_tokens=asked.max_new_tokens,
        begin_with_bos=asked.begin_with_bos,
    )


def main() -> int:
    """Returns the exit code."""

    return exit_code(
        lambda: evaluate(parsed(sys.argv[1:])), (DataError, CheckpointError, DiskError)
    )


if __name__ == "__main__":
    sys.exit(main())
