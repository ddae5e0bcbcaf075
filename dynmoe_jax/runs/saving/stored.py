"""Arrays of a checkpoint, read from disk slice by slice, in float32 whatever is stored."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import tensorstore as ts

from dynmoe_jax.runs.saving.streamed import Index

_CACHE_BYTES = 1 << 27
"""Memory for chunks that hold more than the slice that was asked for: the next one may be there."""

_ENTRY = "/.zarray"


class StoredArrays:
    """Arrays of a checkpoint's state by their dotted names; each is opened and kept open.

    One parameter restored by Orbax (0.12) takes about twice its size
    (docs/measurements.md: orbax-restore).

    Args:
      state: the folder of the checkpoint's state.
    """

    def __init__(self, state: Path):
        folder = {"driver": "file", "path": f"{state.absolute()}/"}
        self._store = {"driver": "ocdbt", "base": folder}
        self._cache = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        self._opened: dict[tuple[str, bool], ts.TensorStore] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._on_disk

    @property
    def names(self) -> set[str]:
        """Names of all arrays."""
        return set(self._on_disk)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array."""
        return self._array(name).shape

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """Slice at an index of the leading axes, in float32."""
        array = self._array(name)
        if index and max(array.chunk_layout.read_chunk.shape[: len(index)]) > 1:
            array = self._array(name, cached=True)
        return array[tuple(index)].read().result().astype(np.float32, copy=False)

    def slices(self, name: str) -> Iterator[tuple[int | None, np.ndarray]]:
        """Yields (index of the first axis, slice) of an array, or (None, all of it).

        Slice by slice where that is how it lies on disk; of others each slice would read more.
        """
        array = self._array(name)
        if array.rank and array.chunk_layout.read_chunk.shape[0] == 1 < array.shape[0]:
            for index in range(array.shape[0]):
                yield index, self.read(name, (index,))
        else:
            yield None, self.read(name)

    def _array(self, name: str, cached: bool = False) -> ts.TensorStore:
        if (name, cached) not in self._opened:
            store = self._store | {"path": f"{self._on_disk[name]}/"}
            spec = {"driver": "zarr", "kvstore": store, "recheck_cached_data": False}
            context = self._cache if cached else None
            self._opened[name, cached] = ts.open(spec, read=True, context=context).result()
        return self._opened[name, cached]

    @cached_property
    def _on_disk(self) -> dict[str, str]:
        """Names on disk: those of parameters have a "value" more at the end."""
        keys = [key.decode() for key in ts.KvStore.open(self._store).result().list().result()]
        stored = [key.removesuffix(_ENTRY) for key in keys if key.endswith(_ENTRY)]
        return {name.removesuffix(".value"): name for name in stored}
