"""Training of one run, told from top to bottom: settings, data, state, step, loop, results."""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.markup import escape
from rich.table import Table

from dynmoe_jax import config
from dynmoe_jax.cluster import agreement
from dynmoe_jax.cluster.same_settings import check_same_settings
from dynmoe_jax.cluster.watch import losses_told
from dynmoe_jax.console import console, stage, warn
from dynmoe_jax.data import DataError, check_sources
from dynmoe_jax.experts import make_backend, make_transport, no_kernels
from dynmoe_jax.hardware.target import current_target
from dynmoe_jax.mesh.make_mesh import batch_sharding, check_divides, make_mesh
from dynmoe_jax.model.components import compute_dtype
from dynmoe_jax.model.kernels.attention.choice import attention_of, choose_attention
from dynmoe_jax.model.parameters import count_parameters
from dynmoe_jax.runs.begun import check_compatible, check_not_imported, make_folder, saved_config
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.runs.compilation import compiled_programs_kept
from dynmoe_jax.runs.disk import DiskError, check_folder_name, disk_errors
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.lock import locked
from dynmoe_jax.runs.metrics_file import check_packages
from dynmoe_jax.runs.recovery import recover
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.runs.text import load_text
from dynmoe_jax.training.domain_weights import DomainWeights, check_reweighting
from dynmoe_jax.training.feed import Feed
from dynmoe_jax.training.finish import finish_run
from dynmoe_jax.training.health.memory import Memory, OutOfMemory
from dynmoe_jax.training.health.rescue import BadNumbers, RolledBack, rescue
from dynmoe_jax.training.health.skips import SkippingStream, skips_of
from dynmoe_jax.training.heldout import HeldOutEvaluation
from dynmoe_jax.training.initial_model import with_initial_model
from dynmoe_jax.training.interrupt import Stopped, StopRequest, stop_on_signal
from dynmoe_jax.training.log.metric_logger import MetricLogger, PendingStep
from dynmoe_jax.training.log.seconds import Seconds
from dynmoe_jax.training.log.summary_tables import print_summary
from dynmoe_jax.training.longer import before_decay
from dynmoe_jax.training.run import Run
from dynmoe_jax.training.start import start

BAD_INPUT = (
    config.ConfigError, DataError, CheckpointError, DiskError, BadNumbers, OutOfMemory
)  # fmt: skip
PLAIN = {"soft_wrap": True, "markup": False}
"""For lines with a path in them: in one piece, and brackets are brackets."""


def train(cfg: config.Config, workdir: Path) -> int:
    """Trains, evaluates and reports one run; continues it if it was begun before.

    Args:
      cfg: all settings.
      workdir: the run's folder: checkpoints, metrics, tokenizer, report, prepared data.

    Returns:
      the process's exit code: 0, EXIT_INTERRUPTED after Ctrl-C, EXIT_PREEMPTED after SIGTERM.

    Raises:
      ConfigError: settings that contradict the devices, the data or the run in ``workdir``, or
        another process uses it.
      DataError: sources that cannot be read, or that are not those that the run began with.
      CheckpointError: a checkpoint cannot be written, or none is whole.
      DiskError: the disk is full or fails.
      BadNumbers: losses or gradients that stay non-finite, or jump however often one goes back.
      OutOfMemory: the run does not fit into the devices' memory.
    """
    seconds = Seconds()

    # ── Settings: everything that can be refused is refused before anything is computed ──────────
    check_not_imported(workdir)
    cfg = with_initial_model(cfg, workdir)
    check_same_settings(cfg)
    if begun := saved_config(workdir):  # what the run has of kinds that are not imported stays
        cfg = dataclasses.replace(cfg, kept=begun.kept)
    check_reweighting(cfg, begun is not None)
    if agreement.on_first(lambda: _is_complete(cfg, workdir)):
        return 0
    mesh, memory = check_run(cfg)
    agreement.on_first(lambda: make_folder(workdir))
    with (
        disk_errors(workdir),
        locked(workdir),
        contextlib.closing(Checkpoints(workdir, cfg.checkpoint)) as checkpoints,
        compiled_programs_kept(cfg.train, workdir),
        memory.explained(),
    ):
        run = Run(cfg, workdir, mesh, memory, checkpoints, StopRequest(), seconds, asked=cfg)
        while True:
            try:
                with losses_told():
                    code = _train(run)
                if code is not None:
                    return code
            except RolledBack as back:
                warn(str(back))
                if run.stop.requested:
                    console.print("Stopped there; the same command continues.")
                    return run.stop.exit_code


def _is_complete(cfg: config.Config, workdir: Path) -> bool:
    """Whether nothing is left to do, which is then shown.

    Raises:
      ConfigError: the run that was begun there cannot go on with these settings.
    """
    saved = saved_config(workdir)
    if saved:
        check_compatible(saved, cfg, workdir)
    summary = read_summary(workdir)
    if not (summary and summary.complete and summary.step >= cfg.train.steps):
        return False
    console.print(f"The run in {workdir} is complete: {summary.step:,} steps.", **PLAIN)
    print_summary(summary, workdir)
    return True


def check_run(cfg: config.Config) -> tuple[Mesh, Memory]:
    """(mesh, memory) of a run whose settings fit sources, packages, devices and their memory.

    Raises:
      ConfigError, DataError, OutOfMemory: they do not.
    """
    check_folder_name("data.directory", cfg.data.directory)
    check_folder_name("train.compilation_cache", cfg.train.compilation_cache)
    if agreement.is_first():  # the others need neither
        check_sources(cfg.data)
        check_packages(cfg.logging)
    mesh = make_mesh(cfg.mesh, cfg.train.batch_size // cfg.train.microbatches)
    for step in config.growth_steps(cfg.train):
        _check_model(config.settings_at(cfg, step + 1), mesh)
    return mesh, _check_model(config.settings_at(cfg, 1), mesh)


def _check_model(cfg: config.Config, mesh: Mesh) -> Memory:
    """The memory of a model that fits devices; raises as :func:`check_run`."""
    target, model = current_target(), cfg.model
    for layer in dict.fromkeys(model.by_layer):
        choose_attention(
            attention_of(model),
            target,
            compute_dtype(model),
            cfg.data.seq_len,
            layer.model.head_width,
            layer.model.num_heads,
            layer.model.num_kv_heads,
        )
    check_divides(model, mesh.shape)
    for moe in dict.fromkeys((model.moe, *model.moe_settings)):
        make_backend(moe, target, model.plain)
        make_transport(moe, mesh.shape["expert"])
    memory = Memory(cfg, mesh.shape)
    memory.check_state()
    return memory


def _train(run: Run) -> int | None:
    """The run from its newest checkpoint to its last step, or until it is stopped or the model
    grows.

    Returns:
      the exit code; None where the model grows next: the run goes on from the checkpoint before.
    """
    checkpoints, seconds, stop = run.checkpoints, run.seconds, run.stop
    done = recover(checkpoints, run.asked.checkpoint.verify) or 0
    done = before_decay(run.asked, run.workdir, checkpoints, done)
    run, last = run.at(done), run.grows_after(done)
    cfg = run.cfg
    _print_settings(run.asked, run.workdir, done)
    if done in config.growth_steps(run.asked.train):
        console.print(f"The model grows to {count_parameters(cfg.model):,} parameters.")

    # ── Data ─────────────────────────────────────────────────────────────────────────────────────
    with seconds.of("data preparation"):
        position = checkpoints.position(done) if done else None
        prepared, tokenizer = load_text(cfg, run.workdir, position)
        feed = Feed(cfg, prepared, tokenizer, batch_sharding(run.mesh), position)
        weights = DomainWeights(cfg, feed.stream, prepared)
        batches = SkippingStream(feed.stream, skips_of(run.workdir, done), done)

    with jax.set_mesh(run.mesh), contextlib.ExitStack() as at_end:
        # ── State and step ───────────────────────────────────────────────────────────────────────
        with seconds.of("compile"), stage("Compiling the training step"):
            train_step, state = start(run, done, tokenizer)
        evaluate = HeldOutEvaluation(run, prepared, tokenizer)

        # ── Loop: step s is dispatched before the metrics of step s-1 are read ───────────────────
        step, pending, heldout = done, None, None
        at_end.enter_context(stop_on_signal(stop))
        log = at_end.enter_context(MetricLogger(cfg, run.workdir, done))
        at_end.callback(lambda: log.read(pending))  # whatever ends the loop, the step has its line

        def act() -> None:
            if log.anomaly:
                rescue(log.anomaly, run, state)

        def save() -> None:
            with seconds.of("saving"):
                log.flush(pending)
                loss = heldout.loss if heldout else None
                checkpoints.save(step, state, feed.position(), run.asked, loss)

        with contextlib.suppress(Stopped):
            if _evaluates(done, cfg) and log.owes_heldout(done):
                evaluates = partial(evaluate, state.params, done == cfg.train.steps)
                heldout = log.complete(done, evaluates)
                weights.move(done, heldout)
            for step in range(done + 1, last + 1):
                with seconds.of("data waiting"):
                    batch = feed.place(next(batches))
                with seconds.of("step"):
                    state, metrics = train_step(state, batch)
                    dispatched = PendingStep(step, metrics | weights.metrics, batch)
                    log.read(pending)
                    pending = dispatched
                act()
                if checkpoints.reached_preemption(step):
                    stop.preempt()
                heldout = None
                with checkpoints.saving(step, step == last, save):
                    if _evaluates(step, cfg):
                        evaluates = partial(evaluate, state.params, step == cfg.train.steps)
                        heldout = log.read_with_heldout(pending, evaluates)
                        weights.move(step, heldout)
                checkpoints.check()
                stop.check()
            if last == cfg.train.steps:
                heldout = heldout or evaluate(state.params, analyze=True)
        log.read(pending)
        act()
        if stop.requested:
            save()
        # Who finds a summary looks for nothing else: the last checkpoint has to be there before.
        checkpoints.wait()
    if stop.requested:
        console.print(f"Stopped after step {step:,} and saved; the same command continues.")
        return stop.exit_code
    if last < cfg.train.steps:
        return None

    # ── Results ──────────────────────────────────────────────────────────────────────────────────
    # Outside the mesh: the sample is one sequence, which a data axis cannot split.
    finish_run(cfg, run.workdir, step, state.params, heldout, tokenizer, seconds, evaluate.routing)
    return 0


def _evaluates(step: int, cfg: config.Config) -> bool:
    """Whether the run evaluates after this step: at its end, and every so many steps (0: never)."""
    every = cfg.evaluation.every_steps
    return step == cfg.train.steps or (every > 0 and step % every == 0)


def _print_settings(cfg: config.Config, workdir: Path, done: int) -> None:
    """Prints the settings of a run that differ from the defaults."""
    verb = f"Continuing {workdir} after step {done:,}" if done else f"New run in {workdir}"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    devices += f" in {jax.process_count()} processes" if agreement.has_peers() else ""
    console.print(f"{verb}, on {devices}", **PLAIN)
    table = Table("setting", "value", "default", box=None, pad_edge=False)
    for path, value, default in config.differences(cfg):
        table.add_row(path, escape(str(value)), escape(str(default)), style="none")
    console.print(table)
    for remark in dict.fromkeys(map(no_kernels, cfg.model.moe_settings)):
        if remark:
            console.print(remark, **PLAIN)
