"""Jobs given to worker processes, with progress over all of them."""

import contextlib
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dynmoe_jax import config
from dynmoe_jax.console import console
from dynmoe_jax.runs.formatting import clock, duration

_POLL_S = 0.5


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing that a worker does.

    Attributes:
      title: for people.
      message: makes what the worker is told, once all that it needs is done; None where nothing is
        left to do.
      cost: seconds that it is expected to take.
      needs: numbers of the jobs that must be done before.
      share_done: part of it that is done, from 0 to 1, while it is under way.
      told: a line about it when it is done.
      keep: keeps what was found.
    """

    title: str
    message: Callable[[], dict[str, Any] | None]
    cost: float
    needs: frozenset[int] = frozenset()
    share_done: Callable[[], float] = lambda: 0.0
    told: Callable[[], str] = lambda: ""
    keep: Callable[[Any], None] = lambda found: None


class Worker:
    """A worker process.

    Args:
      program: module that it runs, which ends in :func:`.serve.serve`.
      log: file for what it says.
      arguments: of its command line besides, such as plug-ins.
      xla_flags: that it has besides those of the environment.
    """

    def __init__(self, program: str, log: Path, arguments: Sequence[str], xla_flags: str):
        self.log, self.number, self.begun = log, None, 0.0
        log.parent.mkdir(parents=True, exist_ok=True)
        # Of blanks alone, XLA makes the name of a file, and ends.
        flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()}
        # A log is no terminal, whatever a notebook says of where it prints itself.
        uncolored = {name: os.environ[name] for name in os.environ if name != "FORCE_COLOR"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", program, str(log), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=uncolored | flags,
        )

    def give(self, number: int, message: dict[str, Any]) -> None:
        """Has it begin a job; that it has ended is found when its answer is read."""
        self.number, self.begun = number, time.perf_counter()
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def answer(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Its answer, which is there.

        Args:
          jobs: of which it does one, or none.

        Raises:
          ConfigError: it has failed, or ended without an answer.
        """
        title = "" if self.number is None else f"{jobs[self.number].title}: "
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise config.ConfigError(
                f"{title}the worker process ended with code {code}; read in {self.log} why, mend "
                "that, and start the same command again, which continues."
            )
        answer = json.loads(line)
        if "error" in answer:
            raise config.ConfigError(f"{title}{answer['error']}")
        return answer

    def leave(self) -> None:
        """Has it save what it does, and waits until it has ended."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()


class Workers:
    """Worker processes that do jobs side by side.

    Args:
      program: module that they run.
      count: how many.
      logs: folder of what they say.
      arguments: of their command lines.
      xla_flags: of all of them.
    """

    def __init__(
        self,
        program: str,
        count: int,
        logs: Path,
        arguments: Sequence[str] = (),
        xla_flags: str = "",
    ):
        names = [f"worker-{number}.txt" for number in range(count)]
        self._workers = [Worker(program, logs / name, arguments, xla_flags) for name in names]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            for worker in self._workers:
                with contextlib.suppress(OSError):
                    worker.process.stdin.close()
            for worker in self._workers:
                worker.leave()
        except KeyboardInterrupt:
            for worker in self._workers:
                worker.process.kill()
            raise

    def run(self, jobs: Sequence[Job], title: str) -> list[Any]:
        """Does all jobs; returns what each has found, in order.

        Raises:
          ConfigError: a job failed, or a worker has ended.
        """
        found: dict[int, Any] = {}
        waiting = dict(enumerate(jobs))
        with _shown(jobs, title) as progress, selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            while waiting or any(w.number is not None for w in self._workers):
                self._give(waiting, jobs, found, progress)
                for key, _ in selector.select(_POLL_S):
                    worker, answer = key.data, key.data.answer(jobs)
                    if worker.number is None:
                        continue
                    number, worker.number = worker.number, None
                    if answer["code"]:
                        raise KeyboardInterrupt
                    found[number] = answer.get("found")
                    jobs[number].keep(found[number])
                    progress.done(number, time.perf_counter() - worker.begun)
                progress.show({w.number: jobs[w.number].share_done() for w in self._busy})
        return [found[number] for number in range(len(jobs))]

    @property
    def _busy(self) -> Iterator[Worker]:
        return (worker for worker in self._workers if worker.number is not None)

    def _give(self, waiting: dict[int, Job], jobs, found: dict[int, Any], progress) -> None:
        """Gives each worker that has none the first job that is ready."""
        for worker in self._workers:
            while worker.number is None:
                ready = (n for n, job in waiting.items() if job.needs <= found.keys())
                if (number := next(ready, None)) is None:
                    break
                if message := waiting.pop(number).message():
                    worker.give(number, message)
                else:
                    found[number] = None
                    progress.done(number, 0.0)


class _Shown:
    """Progress over jobs, in the seconds that they were expected to take."""

    def __init__(self, jobs: Sequence[Job], progress: Progress, task):
        self._jobs, self._progress, self._task = jobs, progress, task
        self._finished: dict[int, float] = {}
        self._begun = time.perf_counter()

    def done(self, number: int, seconds: float) -> None:
        """Counts a job, and says so where no bar can."""
        self._finished[number] = seconds
        job = self._jobs[number]
        if told := job.told():
            count = f"{len(self._finished)} of {len(self._jobs)}"
            left = f"; {duration(self._left({}))} left"
            console.print(f"{count}: {told}{left}", markup=False, soft_wrap=True)

    def show(self, under_way: dict[int, float]) -> None:
        """Draws the bar: jobs under way with the part of each that is done."""
        titles = ", ".join(self._jobs[number].title for number in under_way)
        self._progress.update(
            self._task,
            completed=self._expected(under_way),
            description=titles or "waiting",
            left=clock(self._left(under_way)),
        )

    def _expected(self, under_way: dict[int, float]) -> float:
        done = sum(self._jobs[number].cost for number in self._finished)
        return done + sum(self._jobs[n].cost * share for n, share in under_way.items())

    def _left(self, under_way: dict[int, float]) -> float:
        """Seconds that are left, by how long what is done took against what was expected."""
        done = self._expected(under_way)
        rest = sum(job.cost for job in self._jobs) - done
        taken = time.perf_counter() - self._begun
        # Until a job is done, the expectation is as good as what has been seen.
        return rest * (taken / done if self._finished and done > 0 else 1.0)


@contextlib.contextmanager
def _shown(jobs: Sequence[Job], title: str) -> Iterator[_Shown]:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left"),
    ]
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        total = sum(job.cost for job in jobs)
        task = progress.add_task(title, total=total, left=clock(total))
        yield _Shown(jobs, progress, task)
