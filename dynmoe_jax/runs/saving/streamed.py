"""Arrays that a checkpoint takes slice by slice: they never exist as a whole."""

import asyncio
import collections
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from numpy.typing import DTypeLike

from dynmoe_jax.compat import SlicewiseHandler
from dynmoe_jax.runs.saving.chunks import finest_cut

Index = tuple[int, ...]
"""Numbers along the leading axes of an array; empty for all of it."""


class StreamedArray:
    """A leaf of a state that :class:`.Checkpoints` saves; it is read back as any other.

    Attributes:
      shape: of the whole.
      dtype: of the numbers on disk.
      axes: number of leading axes by which it is asked for, and cut on disk: a chunk that is
        written in parts would be read and merged.

    Args:
      shape: of the whole.
      make: what stands at an index of ``axes`` numbers, in any type of floating point.
      axes: the most leading axes by which it may be asked for; fewer of them are used where slices
        would be small, and none for a whole that is.
      dtype: float32 or bfloat16.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        make: Callable[[Index], np.ndarray],
        axes: int = 0,
        dtype: DTypeLike = np.float32,
    ):
        self.shape, self.make, self.dtype = tuple(shape), make, jnp.dtype(dtype)
        self.axes = finest_cut(self.shape, self.itemsize, axes)

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of a number on disk."""
        return self.dtype.itemsize


_UNDER_WAY_BYTES = 1 << 26
"""Bytes that may wait for the disk while the next slice is made."""


class _Handler(SlicewiseHandler):
    """Makes one slice at a time, of all arrays together, while others are on their way to disk."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._turn: asyncio.Lock | None = None
        self._under_way: collections.deque[tuple[ts.Future, int]] = collections.deque()

    def typestr(self) -> str:
        """Name of the type in metadata; whoever restores says what it becomes."""
        return "dynmoe_jax.StreamedArray"

    async def serialize(self, values, infos, args=None):
        # Bound to the event loop of this save.
        self._turn = asyncio.Lock()
        self._under_way.clear()
        return await super().serialize(values, infos, args)

    async def write_array(self, value, tspec, ts_context):
        array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        own = []
        for index in np.ndindex(value.shape[: value.axes]):
            async with self._turn:
                made = np.asarray(value.make(index)).astype(value.dtype, copy=False)
                await self._room_for(made.nbytes)
                written = array[index].write(made, can_reference_source_data_indefinitely=True)
                self._under_way.append((written, made.nbytes))
                own.append(written)
        for written in own:
            await written

    async def _room_for(self, num_bytes: int) -> None:
        """Waits until so many bytes more may be under way."""
        while self._under_way:
            if sum(size for _, size in self._under_way) + num_bytes <= _UNDER_WAY_BYTES:
                return
            await self._under_way[0][0]
            self._under_way.popleft()


ocp.type_handlers.register_type_handler(StreamedArray, _Handler(), override=True)
