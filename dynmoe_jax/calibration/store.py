"""Statistics of a model on a text, and the file that keeps them.

The file is safetensors; its header says in JSON what they are of.
"""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dynmoe_jax import config
from dynmoe_jax.calibration.pricing import SAMPLES
from dynmoe_jax.calibration.statistics import STATISTICS

_HEADER, _FORMAT = "calibration", 1


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics by name and layer.

    Attributes:
      model: digest of the model.
      data: digest of the text.
      samples: tokens that are sampled.
      seed: which ones.
      tokens: that the statistics are of; 0 before any are gathered.
      arrays: by (name of the statistic, number of the layer).
    """

    model: str
    data: str
    samples: int = SAMPLES
    seed: int = 0
    tokens: int = 0
    arrays: Mapping[tuple[str, int], np.ndarray] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name_and_layer: tuple[str, int]) -> np.ndarray:
        return self.arrays[name_and_layer]

    def by_layer(self, name: str) -> dict[int, np.ndarray]:
        """The arrays of a statistic by the layer's number."""
        return {n: array for (each, n), array in sorted(self.arrays.items()) if each == name}

    def missing(self, wanted: Mapping[int, Collection[str]]) -> dict[int, tuple[str, ...]]:
        """Names by layer of statistics that are not there yet."""
        return {
            layer: tuple(name for name in names if (name, layer) not in self.arrays)
            for layer, names in wanted.items()
        }

    def save(self, path: Path) -> None:
        """Writes the file; whoever is killed meanwhile leaves the old one."""
        facts = dataclasses.asdict(dataclasses.replace(self, arrays={}))
        del facts["arrays"]
        names = {f"{layer}.{name}": [name, layer] for name, layer in self.arrays}
        header = {"format": _FORMAT, **facts, "arrays": names}
        arrays = {f"{n}.{name}": np.ascontiguousarray(a) for (name, n), a in self.arrays.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may be writing the same statistics.
        beside = path.with_name(f"{path.name}.{os.getpid()}.new")
        save_file(arrays, beside, metadata={_HEADER: json.dumps(header)})
        os.replace(beside, path)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Reads the file.

        Raises:
          ConfigError: it is not one of these.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                if header.pop("format") != _FORMAT:
                    raise KeyError("format")
                arrays = {
                    (name, layer): file.get_tensor(key)
                    for key, (name, layer) in header.pop("arrays").items()
                    if name in STATISTICS
                }
                return cls(**header, arrays=arrays)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise config.ConfigError(
                f"{str(path)!r} is no file of statistics that this version reads; remove it, or "
                "name another."
            ) from error

    @classmethod
    def opened(cls, path: Path, wanted: "Statistics") -> "Statistics":
        """Statistics that a file has of the same model and text; ``wanted``, empty, without a file.

        Where other tokens are sampled, samples are left out.

        Raises:
          ConfigError: the file is of another model or text, or none of these at all.
        """
        if not path.exists():
            return wanted
        found = cls.load(path)
        for name, said in (("model", "model"), ("data", "text")):
            if getattr(found, name) != getattr(wanted, name):
                raise config.ConfigError(
                    f"{str(path)!r} has statistics of another {said}; remove it, or name another."
                )
        if (found.samples, found.seed) == (wanted.samples, wanted.seed):
            return found
        kept = {at: a for at, a in found.arrays.items() if STATISTICS[at[0]].form != "sample"}
        return dataclasses.replace(wanted, tokens=found.tokens, arrays=kept)
