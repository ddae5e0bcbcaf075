"""The speed at which a checkpoint is written where training needs the same cores.

On an accelerator a step leaves the host alone.  On a CPU, whatever is written takes from the
steps, to be written and to be summed up (docs/measurements.md: save-write, save-checksum).  So it
is spread over as many steps as it takes for none of them to suffer; until somebody waits for it.
"""

import asyncio
import collections
import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dynmoe_jax.compat import array_metadata_store
from dynmoe_jax.runs.saving.streamed import StreamedArray

_BYTES_PER_SECOND_AND_CORE = 25e6
"""A small part of what the core could do (docs/measurements.md: save-write)."""

_LONGEST_S = 300.0
"""Longest time that writing may take, in seconds: what is not yet saved can be lost, so a large
state is written faster."""

_CHECKSUM_SHARE = 0.25
"""Cost of a checksum, as a share of the cost of writing."""


class Pace:
    """Pauses between the pieces of a checkpoint that is being written.

    Args:
      bytes_per_second: to write; 0 for no pauses.
    """

    def __init__(self, bytes_per_second: float):
        self._usual = self._rate = bytes_per_second
        self._hurry = threading.Event()

    @classmethod
    def of_this_machine(cls) -> "Pace":
        """Without pauses, unless steps are computed by the cores that write."""
        if jax.default_backend() != "cpu":
            return cls(0.0)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return cls(cores * _BYTES_PER_SECOND_AND_CORE)

    @property
    def pauses(self) -> bool:
        """Whether there are any."""
        return self._usual > 0

    @property
    def hurries(self) -> bool:
        """Whether somebody waits for the checkpoint."""
        return self._hurry.is_set()

    def begin(self, num_bytes: int) -> None:
        """Sets the speed for a checkpoint of this size."""
        self._rate = max(self._usual, num_bytes / _LONGEST_S)

    @contextlib.contextmanager
    def waited_for(self) -> Iterator[None]:
        """Within the context there are no pauses, and the one that is under way ends."""
        self._hurry.set()
        try:
            yield
        finally:
            self._hurry.clear()

    def after_writing(self, num_bytes: int) -> None:
        """Pauses after so many bytes were written."""
        if self.pauses:
            self._hurry.wait(num_bytes / self._rate)

    def after_summing(self, num_bytes: int) -> None:
        """Pauses after the checksum of so many bytes was computed."""
        self.after_writing(_CHECKSUM_SHARE * num_bytes)


class _Turns:
    """Lets one array after the other be written, with pauses; Orbax's ``ByteLimiter``.

    Once somebody waits for the checkpoint, all that are left are written at once: one by one, each
    of them costs milliseconds in which nothing is computed (docs/measurements.md: save-one-by-one).
    """

    def __init__(self, pace: Pace):
        self._pace = pace
        self._busy = False
        self._waiting: collections.deque[asyncio.Future] = collections.deque()

    async def wait_for_bytes(self, requested_bytes: int) -> None:
        """Returns when it is the turn of an array of so many bytes."""
        if self._busy and not self._pace.hurries:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self._busy = True

    async def release_bytes(self, requested_bytes: int) -> None:
        """Lets the next one have its turn, after a pause; or all, without one."""
        await asyncio.to_thread(self._pace.after_writing, requested_bytes)
        self._busy = False
        while self._waiting:
            turn = self._waiting.popleft()
            if turn.done():  # cancelled with its save
                continue
            self._busy = True
            turn.set_result(None)
            if not self._pace.hurries:
                return


class _PacedArrays(ocp.type_handlers.ArrayHandler):
    """Orbax's way to write arrays, at a pace."""

    def __init__(self, pace: Pace):
        usual = ocp.type_handlers.get_type_handler(jax.Array)
        super().__init__(array_metadata_store=array_metadata_store(usual))
        self._pace = pace

    async def serialize(self, values: Sequence, infos: Sequence, args: Any = None) -> Sequence:
        turns = _Turns(self._pace)  # bound to the event loop of this save
        paced = [info.replace(byte_limiter=turns) for info in infos]
        return await super().serialize(values, paced, args)


def paced_types(pace: Pace) -> ocp.type_handlers.TypeHandlerRegistry:
    """Handlers by which Orbax saves the leaves of a state, arrays at a pace."""
    arrays = (jax.Array, _PacedArrays(pace))
    others = [
        (t, ocp.type_handlers.get_type_handler(t)) for t in (np.ndarray, np.number, StreamedArray)
    ]
    return ocp.type_handlers.create_type_handler_registry(arrays, *others)
