"""Batches that a run leaves out since they made its loss jump: ``skipped_batches.json``.

Batches count from 1 in the order of the stream.  The ranges hold for the whole run: from any
checkpoint that was written before a range was added, or after, the same batches follow.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.cluster import agreement
from dynmoe_jax.data import Batch, TrainStream
from dynmoe_jax.runs.records import from_json, to_json, write_atomically

FILE_NAME = "skipped_batches.json"


@dataclasses.dataclass(frozen=True)
class Skip:
    """One range.

    Attributes:
      first: batch number.
      last: batch number, included.
      spike_step: the step at which the loss was seen to jump.
      resumed_step: the checkpoint that training went back to.
    """

    first: int
    last: int
    spike_step: int
    resumed_step: int


def read_skips(workdir: Path) -> list[Skip]:
    """The ranges of a run in the order in which they were added; none in a new run.

    Of several processes, process 0 reads them.

    Raises:
      ConfigError: the file is damaged.
    """
    path = workdir / FILE_NAME
    try:
        lines = agreement.on_first(
            lambda: from_json(path.read_text(encoding="utf-8")) if path.exists() else []
        )
        return [Skip(**line) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise config.ConfigError(
            f"{path} cannot be read, so the batches that this run leaves out are not known; "
            "restore the file, or delete it to train on them."
        ) from error


def skips_of(workdir: Path, done: int) -> list[Skip]:
    """The ranges of the run that continues after step ``done``; a new run forgets those there."""
    if not done and agreement.is_first():
        (workdir / FILE_NAME).unlink(missing_ok=True)
    return read_skips(workdir)


def write_skips(workdir: Path, skips: Sequence[Skip]) -> None:
    """Replaces the ranges of a run."""
    lines = [dataclasses.asdict(skip) for skip in skips]
    write_atomically(workdir / FILE_NAME, to_json(lines, indent=2) + "\n")


def batch_of_step(step: int, skips: Sequence[Skip]) -> int:
    """Number of the batch that a step trains on; 0 for step 0."""
    number = step
    for first, last in _disjoint(skips):
        if number >= first:
            number += last - first + 1
    return number


def _disjoint(skips: Sequence[Skip]) -> list[tuple[int, int]]:
    """(first, last) of the union, rising."""
    union: list[tuple[int, int]] = []
    for first, last in sorted((skip.first, skip.last) for skip in skips):
        if union and first <= union[-1][1] + 1:
            first, last = union[-1][0], max(last, union.pop()[1])
        union.append((first, last))
    return union


class SkippingStream:
    """A training stream without the batches of some ranges.

    Args:
      stream: all batches.
      skips: the ranges.
      step: the step after which the stream stands; 0 at its beginning.
    """

    def __init__(self, stream: TrainStream, skips: Sequence[Skip], step: int):
        self._stream = stream
        self._left_out = _disjoint(skips)
        self._number = batch_of_step(step, skips)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while True:
            batch = next(self._stream)
            self._number += 1
            if not any(first <= self._number <= last for first, last in self._left_out):
                return batch
