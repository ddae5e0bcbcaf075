"""Ctrl-C and SIGTERM: finish the step, save, leave."""

import contextlib
import signal
from collections.abc import Iterator

from dynmoe_jax.console import console


class StopRequest:
    """Whether somebody asked the run to stop."""

    def __init__(self):
        self.requested = False

    def handle(self, number, frame) -> None:
        """The signal handler: the first signal is a request, the second one ends at once."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        console.print("Stopping after this step; once more to leave at once.")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a request that the loop reads between steps."""
    request = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
