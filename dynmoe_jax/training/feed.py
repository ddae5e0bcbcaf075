"""Feed of batches: which part a process reads, and the way onto the devices.

The rows that a process needs follow from the sharding of the batch, whatever the mesh is and
however its devices lie among the processes.  Where an axis that does not split the batch reaches
over several processes, they need the same rows, and each of them reads them.

Axis legend: B batch, L positions.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from dynmoe_jax import config
from dynmoe_jax.cluster import agreement
from dynmoe_jax.console import warn
from dynmoe_jax.data import Batch, Prepared, Tokenizer, TrainStream, merge_states, shards_of_rows
from dynmoe_jax.registry import chosen


class Feed:
    """The training batches, of which this process reads what its devices hold.

    Args:
      cfg: all settings.
      prepared: the data.
      tokenizer: its tokenizer.
      sharding: of the [B, L] arrays of a batch.
      position: that the feed goes on from, see :meth:`position`; None for the beginning.
    """

    def __init__(
        self,
        cfg: config.Config,
        prepared: Prepared,
        tokenizer: Tokenizer,
        sharding: NamedSharding,
        position: Mapping[str, Any] | None = None,
    ):
        size, count = cfg.train.batch_size, cfg.data.virtual_shards
        self._sharding, self._shape = sharding, (size, cfg.data.seq_len)
        shards = shards_of_rows(rows_here(sharding, self._shape), size, count)
        self._rows = np.arange(size) if len(shards) == count else _rows_of(shards, size // count)
        more = chosen(cfg.train, "objective").arrays
        self.stream = TrainStream(prepared, tokenizer, cfg.data, size, cfg.seed, shards, more)
        if position is not None:
            self.stream.set_state(position)
        read = agreement.gather(len(self._rows))
        if read is not None and sum(read) > size and _could_be_parted(sharding, self._shape):
            warn(
                f"the {len(read)} processes together read every batch {sum(read) / size:.1f} "
                "times; in a new run, make config.data.virtual_shards a multiple of their number "
                "and config.train.batch_size a multiple of that."
            )

    def place(self, batch: Batch) -> dict[str, jax.Array]:
        """Puts a batch of the stream on the devices: a global array of the parts of all."""
        return _placed(batch, self._rows, self._shape, self._sharding)

    def position(self) -> dict[str, Any]:
        """The position in the whole stream; every process has to ask, and process 0 is told.

        The others get the position in their own part.
        """
        own = self.stream.get_state()
        states = agreement.gather(own)
        return own if states is None else merge_states(states)


def place_whole(batch: Batch, sharding: NamedSharding) -> dict[str, jax.Array]:
    """Puts a batch on the devices that every process has read as a whole."""
    shape = batch["tokens"].shape
    return _placed(batch, np.arange(shape[0]), shape, sharding)


def rows_here(sharding: NamedSharding, shape: tuple[int, int]) -> np.ndarray:
    """Numbers, rising, of the rows of a [B, L] array that devices of this process hold."""
    every_row = np.arange(shape[0])
    indices = sharding.addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([every_row[index[0]] for index in indices]))


def _rows_of(shards: list[int], rows_each: int) -> np.ndarray:
    return np.concatenate([np.arange(n * rows_each, (n + 1) * rows_each) for n in shards])


def _could_be_parted(sharding: NamedSharding, shape: tuple[int, int]) -> bool:
    """Whether no two processes need the same row."""
    owners: dict[int, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        owners.setdefault(index[0].start or 0, set()).add(device.process_index)
    return all(len(processes) == 1 for processes in owners.values())


def _placed(batch, rows, shape, sharding):
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)

    def put(array):
        def part(index):
            wanted = np.arange(shape[0])[index[0]]
            return array[np.searchsorted(rows, wanted)][:, index[1]]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: put(array) for name, array in batch.items()}
