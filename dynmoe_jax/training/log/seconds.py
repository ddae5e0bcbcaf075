"""Seconds of a run by what they went into."""

import contextlib
import time
from collections.abc import Iterator


class Seconds:
    """Adds up wall-clock seconds by activity."""

    def __init__(self):
        self._started = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, activity: str) -> Iterator[None]:
        """Counts the time inside the ``with`` block as ``activity``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(activity, time.perf_counter() - start)

    def add(self, activity: str, seconds: float) -> None:
        """Counts ``seconds`` as ``activity``."""
        self._spent[activity] = self._spent.get(activity, 0.0) + seconds

    def by_activity(self) -> dict[str, float]:
        """Seconds by activity so far, with ``total`` since the start."""
        return self._spent | {"total": time.perf_counter() - self._started}
