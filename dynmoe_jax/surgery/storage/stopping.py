"""Failures while a thread saves a checkpoint of arrays that are made meanwhile."""

import contextlib
from collections.abc import Iterator

from dynmoe_jax.runs.checkpoint import Checkpoints


class Stopping:
    """Ends the making of arrays when somebody presses Ctrl-C, and tells what went wrong as it is.

    To whoever saves, whatever goes wrong is the disk's fault.
    """

    def __init__(self):
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Surrounds the making of an array, in the thread that saves."""
        if self._error is not None:
            raise RuntimeError("Saving was stopped.")
        try:
            yield
        except Exception as error:
            self._error = error
            raise

    @contextlib.contextmanager
    def saving(self, checkpoints: Checkpoints) -> Iterator[None]:
        """Surrounds the saving; waits for its end, and closes the checkpoints.

        Raises:
          CheckpointError: the checkpoint could not be written.
        """
        try:
            with contextlib.closing(checkpoints):
                try:
                    yield
                    checkpoints.wait()
                except BaseException as error:
                    self._error = self._error or error
                    raise
        except BaseException as error:
            raise self._error or error from None
