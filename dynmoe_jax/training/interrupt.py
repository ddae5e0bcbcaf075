"""Ctrl-C, SIGTERM and the notice that the machine will be taken away: save, and leave.

Only while there is something to save: before the first step a signal does what it always does.

Of several processes, all have to stop after the same step.  JAX sees to that: it catches SIGTERM in
any of them, agrees with the others on a step that none has reached, and says so at that step
(``Checkpoints.reached_preemption``).
"""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax

from dynmoe_jax.command_line import EXIT_INTERRUPTED, EXIT_PREEMPTED

_EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_PREEMPTED}


class Stopped(Exception):
    """Work that may be left undone was given up because the run was asked to stop."""


class StopRequest:
    """Whether somebody asked the run to stop.

    Attributes:
      exit_code: of the process; None as long as nobody has asked.
    """

    def __init__(self):
        self.exit_code: int | None = None
        # Then JAX has all processes of the run agree before one of them stops.
        self._distributed = jax.distributed.is_initialized()
        self._preempted_code = EXIT_PREEMPTED

    @property
    def requested(self) -> bool:
        """Whether to save and leave."""
        return self.exit_code is not None

    def preempt(self) -> None:
        """Asks in the name of whoever takes the machine away."""
        self.exit_code = self.exit_code or self._preempted_code

    def check(self) -> None:
        """Raises Stopped if the run was asked to stop."""
        if self.requested:
            raise Stopped

    def handle(self, number: int, frame: object) -> None:
        """The signal handler: the first signal is a request, a Ctrl-C after it ends at once."""
        del frame
        # The next one is the kernel's: Python would answer only after the step or the save that
        # is under way.  A second SIGTERM changes nothing: some schedulers send several.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._distributed:
            self._preempted_code = _EXIT_CODES[signal.Signals(number)]
            os.kill(os.getpid(), signal.SIGTERM)
            os.write(2, b"\nStopping after the next steps; Ctrl-C to leave at once.\n")
        elif not self.requested:
            self.exit_code = _EXIT_CODES[signal.Signals(number)]
            # Not by print: the signal may have come in the middle of another one.
            os.write(2, b"\nStopping after this step; Ctrl-C to leave at once.\n")


@contextlib.contextmanager
def stop_on_signal(request: StopRequest) -> Iterator[None]:
    """Turns SIGINT and SIGTERM into a request that the loop reads between steps.

    In a distributed run SIGTERM is left to JAX, and a Ctrl-C is handed on as one.
    """
    numbers = [signal.SIGINT]
    if not jax.distributed.is_initialized():
        numbers.append(signal.SIGTERM)
    before = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
