"""Writers of the numbers of training: ``metrics.jsonl``, TensorBoard, Weights & Biases."""

import importlib.util
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.runs.records import from_json, to_json, write_atomically

Metrics = Mapping[str, float | Sequence[float]]

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Writes the metrics of one run, wherever its settings send them.

    ``metrics.jsonl`` gets one JSON object per call of :meth:`write`, on disk when the call
    returns.  A number that is not finite is ``null`` there (see :mod:`.records`).  TensorBoard and
    Weights & Biases get scalars; a list, which has an entry per layer, becomes
    ``name/layer_00``, ``name/layer_01``, …

    A run that is resumed repeats the steps after its last checkpoint.  What an earlier process
    wrote about them is taken out first, so that every step stands once.

    Args:
      workdir: the run's folder.
      logging: which writers are on.
      resume_step: the last step whose results are kept; 0 starts afresh.
    """

    def __init__(self, workdir: Path, logging: config.Logging, resume_step: int):
        # Before anything is touched: a missing package must not cost a run its old metrics.
        self._wandb = (
            _start_wandb(workdir, logging.wandb_project) if logging.wandb_project else None
        )
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / FILE_NAME
        _forget_after(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = None
        if logging.tensorboard:
            self._tensorboard = _start_tensorboard(workdir / "tensorboard", resume_step)

    def write(self, step: int, metrics: Metrics) -> None:
        """Records ``metrics`` under ``step``."""
        self._file.write(to_json({"step": step, **metrics}) + "\n")
        self._file.flush()
        self._show(step, metrics)

    def read(self) -> list[dict[str, Any]]:
        """The lines that are there."""
        return [record for _, record in _whole_lines(self._path)]

    def add_to(self, step: int, metrics: Metrics) -> None:
        """Adds to the line of a step that stands there already."""
        lines = [
            to_json(record | metrics) if record["step"] == step else line
            for line, record in _whole_lines(self._path)
        ]
        self._file.close()
        write_atomically(self._path, "".join(line + "\n" for line in lines))
        self._file = self._path.open("a", encoding="utf-8")
        self._show(step, metrics)

    def flush(self) -> None:
        """Returns when what was written is on the disk, not only with the system."""
        os.fsync(self._file.fileno())

    def _show(self, step: int, metrics: Metrics) -> None:
        if self._tensorboard is None and self._wandb is None:
            return
        scalars = dict(_scalars(metrics))
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def close(self) -> None:
        """Sends out what is still buffered."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class NoWriter:
    """Takes the place of a :class:`MetricsWriter` in a process whose metrics another one writes."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Does nothing."""

    def read(self) -> list[dict[str, Any]]:
        """No lines."""
        return []

    def add_to(self, step: int, metrics: Metrics) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` in order, NaN where a number was not finite."""
    return [record for _, record in _whole_lines(workdir / FILE_NAME)]


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines that a process finished writing: as text, and parsed."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = from_json(line)
            except (ValueError, RecursionError):
                # Its writer was killed in the middle of it, or is writing it now.
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line.rstrip("\n"), record


def _forget_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [line + "\n" for line, record in _whole_lines(path) if record["step"] <= step]
        write_atomically(path, "".join(kept))


def _scalars(metrics: Metrics) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list | tuple):
            for layer, entry in enumerate(value):
                yield f"{name}/layer_{layer:02d}", entry
        elif value is not None:
            yield name, value


def _start_tensorboard(folder: Path, resume_step: int):
    from tensorboardX import SummaryWriter

    # purge_step makes TensorBoard ignore later steps in the event files of earlier processes.
    return SummaryWriter(logdir=str(folder), purge_step=resume_step + 1, flush_secs=30)


def check_packages(logging: config.Logging) -> None:
    """Raises ConfigError if a writer that is switched on is not installed."""
    if logging.wandb_project and importlib.util.find_spec("wandb") is None:
        raise config.ConfigError(
            f"config.logging.wandb_project={logging.wandb_project!r} needs Weights & Biases: "
            "pip install 'dynmoe_jax[wandb]'."
        )


def _start_wandb(workdir: Path, project: str):
    import wandb

    # The same id continues the same curves; W&B itself ignores steps that it has already seen.
    id_file = workdir / "wandb_run_id"
    if not id_file.exists():
        write_atomically(id_file, uuid.uuid4().hex)
    run_id = id_file.read_text(encoding="utf-8")
    return wandb.init(
        project=project, name=workdir.name, id=run_id, resume="allow", dir=str(workdir)
    )
