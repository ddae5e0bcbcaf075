"""Writing safetensors files tensor by tensor, in any order.

``safetensors`` itself writes a file from tensors that are all in memory.  The format is small: the
length of a header (8 bytes, little-endian), the header (JSON: type, shape and offsets of every
tensor), the bytes.  So the offsets are known beforehand, and each tensor is written to its own.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from dynmoe_jax.interop.architectures.layouts import Shape
from dynmoe_jax.interop.files.tensor_files import INDEX, SINGLE, write_json

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {"float32": "F32", "bfloat16": "BF16"}


class TensorWriter:
    """The safetensors files of one model: one, or several with an index.

    Args:
      folder: where they are written; must exist.
      shapes: of all tensors, by name; each must be written once.
      dtype: ``float32`` or ``bfloat16``.
      shard_bytes: a file holds no more, unless a single tensor does.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Shape], dtype: str, shard_bytes: int):
        self._dtype, self._missing = DTYPES[dtype], set(shapes)
        self._place: dict[str, tuple[Path, int]] = {}
        self._shapes = dict(shapes)
        shards = self._split(shard_bytes)
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        names = [SINGLE] if len(shards) == 1 else names
        for name, shard in zip(names, shards, strict=True):
            self._begin(folder / name, shard, _NAMES[dtype])
        if len(shards) > 1:
            total = sum(self._bytes(name) for name in shapes)
            weight_map = {name: path.name for name, (path, _) in sorted(self._place.items())}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / INDEX, index)

    def write(self, name: str, values: np.ndarray) -> int:
        """Writes one tensor, rounded to the type of the files; returns its bytes."""
        if values.shape != self._shapes[name]:
            raise ValueError(f"{name}: {values.shape} instead of {self._shapes[name]}")
        self._missing.remove(name)
        path, offset = self._place[name]
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(np.ascontiguousarray(values, self._dtype).view(np.uint8).data)
        return self._bytes(name)

    def check_complete(self) -> None:
        """Raises ValueError if a tensor was not written."""
        if self._missing:
            raise ValueError(
                f"not written: {sorted(self._missing)[0]} and {len(self._missing)} in all"
            )

    def _bytes(self, name: str) -> int:
        return math.prod(self._shapes[name]) * self._dtype.itemsize

    def _split(self, shard_bytes: int) -> list[list[str]]:
        shards: list[list[str]] = [[]]
        filled = 0
        for name in self._shapes:
            if shards[-1] and filled + self._bytes(name) > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += self._bytes(name)
        return shards

    def _begin(self, path: Path, names: list[str], dtype: str) -> None:
        """Writes a file's header, and remembers where its tensors go."""
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            start, end = end, end + self._bytes(name)
            shape = list(self._shapes[name])
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        for name in names:
            self._place[name] = path, 8 + len(text) + header[name]["data_offsets"][0]
