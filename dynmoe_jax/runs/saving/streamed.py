"""Arrays that a checkpoint takes and gives slice by slice: they never exist as a whole."""

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from dynmoe_jax.compat import SlicewiseHandler

_SMALL_BYTES = 1 << 20
"""Chunks below this make reading slow, says Orbax."""


class StreamedArray:
    """A float32 leaf of a state that :class:`.Checkpoints` saves; it is read back as any other.

    Attributes:
      shape: of the whole.
      dtype: float32.

    Args:
      shape: of the whole.
      make: what stands at an index of the first axis, or the whole (index None).
      stacked: whether to ask for it index by index, unless it is small.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self, shape: tuple[int, ...], make: Callable[[int | None], np.ndarray], stacked: bool
    ):
        self.shape, self.make = shape, make
        self.by_slice = stacked and 4 * math.prod(shape[1:]) >= _SMALL_BYTES

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def save_args(self) -> ocp.SaveArgs:
        """A slice is a chunk on disk: one that is written in parts would be read and merged."""
        if not self.by_slice:
            return ocp.SaveArgs()
        slice_bytes = 4 * math.prod(self.shape[1:])
        return ocp.SaveArgs(chunk_byte_size=slice_bytes, shard_axes=(0,))


class _Handler(SlicewiseHandler):
    """Writes one slice at a time, of all arrays together."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self._turn: asyncio.Lock | None = None

    def typestr(self) -> str:
        """Name of the type in metadata; whoever restores says what it becomes."""
        return "dynmoe_jax.StreamedArray"

    async def serialize(self, values, infos, args=None):
        # Bound to the event loop of this save.
        self._turn = asyncio.Lock()
        return await super().serialize(values, infos, args)

    async def write_array(self, value, tspec, ts_context):
        array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        for index in range(value.shape[0]) if value.by_slice else [None]:
            async with self._turn:
                where = array if index is None else array[index]
                await where.write(value.make(index), can_reference_source_data_indefinitely=True)


def read_slices(state: Path, path: tuple) -> Iterator[tuple[int | None, np.ndarray]]:
    """Yields (index of the first axis, slice) of a parameter in a checkpoint, or (None, all of it).

    Slice by slice where that is how it lies on disk; of others each slice would read all.

    Args:
      state: the folder of the checkpoint's state.
      path: of the parameter.
    """
    # One parameter restored by Orbax (0.12) takes about twice its size
    # (docs/measurements.md: orbax-restore).
    name = ".".join(map(str, ("params", *path, "value")))
    store = {"driver": "ocdbt", "base": f"file://{state.absolute()}/", "path": f"{name}/"}
    array = ts.open({"driver": "zarr", "kvstore": store}, read=True).result()
    if array.rank and array.chunk_layout.read_chunk.shape[0] == 1 < array.shape[0]:
        for index in range(array.shape[0]):
            yield index, array[index].read().result()
    else:
        yield None, array.read().result()


ocp.type_handlers.register_type_handler(StreamedArray, _Handler(), override=True)
