"""Statistics that an operation wants, gathered on the training text of its first parent.

They are kept in files whose names are digests of the model and the text: another operation, or the
same one with other settings, finds them there and passes no text through the model.

Axis legend: C clusters of text.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.calibration import STATISTICS, Statistics, gather
from dynmoe_jax.data import Batch
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.surgery.experts.text_clusters import text_clusters
from dynmoe_jax.surgery.measuring.text import Text
from dynmoe_jax.surgery.request import Job

FOLDER = "calibration"
"""Name of the folder of such files, beside the result: nothing is written into a parent's."""


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Statistics that were gathered.

    Attributes:
      names: of the statistics.
      by_cluster: statistics of each cluster of text; of all text, one.
      files: that keep them.
    """

    names: frozenset[str] = frozenset()
    by_cluster: Sequence[Statistics] = ()
    files: Sequence[Path] = ()

    def array(self, name: str, layer: int) -> np.ndarray:
        """A statistic of a layer, [C, ...] where there are clusters; samples of all of them."""
        arrays = [each[name, layer] for each in self.by_cluster]
        if STATISTICS[name].form == "sample":
            return np.concatenate(arrays)
        return np.stack(arrays) if len(arrays) > 1 else arrays[0]

    def record(self) -> dict[str, Any]:
        """Record of them in that of the result; empty where none were."""
        if not self.by_cluster:
            return {}
        return {
            "statistics": sorted(self.names),
            "files": [str(file) for file in self.files],
            "data": [each.data for each in self.by_cluster],
            "tokens": [each.tokens for each in self.by_cluster],
            "by_expert": {str(layer): own_E.tolist() for layer, own_E in self._by_expert().items()},
        }

    def _by_expert(self) -> dict[int, np.ndarray]:
        """Tokens of all text that each expert computed, by layer: of so few its statistics are."""
        found: dict[int, np.ndarray] = {}
        for each in self.by_cluster:
            for layer, tokens_E in each.by_layer("routed_tokens").items():
                found[layer] = found.get(layer, 0) + tokens_E
        return found


def statistics_of(job: Job, text: Text) -> Gathered:
    """The statistics that the operation wants; nothing is read where it wants none.

    Raises:
      ConfigError: there are fewer rows of text than clusters are wanted.
    """
    wanted, options = job.wanted, job.asked.options
    if not wanted.names:
        return Gathered()
    batches = text.training(options.calibration_tokens, options.seed)
    parts = [[batch for own in batches.values() for batch in own]]
    parent = job.parents[0]
    if not parts[0]:
        raise ConfigError("--data names no training text, which statistics are gathered of.")
    if wanted.clusters > 1:
        table_VD = parent.model.read(("embedding_VD",))
        parts = text_clusters(parts[0], table_VD, wanted.clusters, options.seed)
    model = wanted.model or parent.config.model
    run = _computed_with(parent.model, model)
    digest, folder = _digest(parent.digest, model), job.to.parent / FOLDER
    found, files = [], []
    for part in parts:
        new = Statistics(digest, digest_of(part), wanted.samples, options.seed)
        file = folder / f"{new.model[:16]}-{new.data[:16]}.safetensors"
        known = Statistics.opened(file, new)
        bound = int(options.calibration_memory * 1e9)
        statistics = gather(run, part, wanted.names, bound, known, wanted.layers)
        if statistics is not known:
            statistics.save(file)
        found.append(statistics)
        files.append(file)
    return Gathered(wanted.names, found, files)


def digest_of(batches: Sequence[Batch]) -> str:
    """Digest of text, as the model is given it."""
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            found.update(f"{name}{batch[name].shape}".encode())
            found.update(np.ascontiguousarray(batch[name]))
    return found.hexdigest()


def _digest(parameters: str, model: config.Model) -> str:
    """Digest of a model's parameters and of the settings that it is computed with."""
    settings = json.dumps(config.to_dict(model), sort_keys=True)
    return hashlib.sha256(f"{parameters} {settings}".encode()).hexdigest()


def _computed_with(run: Any, model: config.Model) -> Any:
    """A model on disk with other settings of its routers."""
    if model == run.config.model:
        return run
    return dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
