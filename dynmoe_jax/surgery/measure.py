"""Before and after: losses of both models on held-out text, and how far apart they are.

Axis legend: T tokens.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynmoe_jax.calibration.logits import logit_statistics
from dynmoe_jax.calibration.stream import forward
from dynmoe_jax.data import Batch
from dynmoe_jax.model.layer import LayerOutput


@dataclasses.dataclass(frozen=True)
class Compared:
    """Two models on the same tokens.

    Attributes:
      tokens: how many.
      loss_before: nats per token.
      loss_after: the same of the result.
      bits_before: bits per byte.
      bits_after: the same of the result.
      kl: KL(before || after), nats per token.
      agreement: share of tokens of which both find the same one most probable.
      difference: largest absolute difference of two logits.
    """

    tokens: int
    loss_before: float
    loss_after: float
    bits_before: float
    bits_after: float
    kl: float
    agreement: float
    difference: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """All of a comparison.

    Attributes:
      all: over all domains.
      domains: by domain.
      largest_logit: of the model before, by absolute value.
      load_before: share of the tokens that chose each expert, by MoE layer.
      load_after: the same of the result.
    """

    all: Compared
    domains: dict[str, Compared]
    largest_logit: float
    load_before: dict[int, list[float]]
    load_after: dict[int, list[float]]

    @property
    def relative_difference(self) -> float:
        """The largest difference, in units of the largest logit where that is above 1."""
        return self.all.difference / max(1.0, self.largest_logit)


def compare(
    before: Any, after: Any, text: Mapping[str, Sequence[Batch]], token_bytes_V: np.ndarray
) -> Measured:
    """Measures two models on the same text, one layer of one of them in memory at a time.

    Args:
      before: a model on disk.
      after: another one with the same vocabulary.
      text: batches by domain.
      token_bytes_V: bytes of UTF-8 that each token stands for.
    """
    batches = [batch for of_domain in text.values() for batch in of_domain]
    hidden, loads = [], []
    for model in (before, after):
        load: dict[int, np.ndarray] = {}

        def add(layer, _, load_E, load=load):
            load[layer] = load.get(layer, 0) + load_E.astype(np.int64)

        hidden.append(forward(model, batches, _load, add))
        loads.append(load)
    found = logit_statistics(before, hidden[0], batches, (after, hidden[1]))
    targets_T, owner_T = _targets(text)
    bytes_T = token_bytes_V[targets_T]
    everywhere = np.ones(len(targets_T), bool)
    return Measured(
        _compared(found, bytes_T, everywhere),
        {name: _compared(found, bytes_T, owner_T == i) for i, name in enumerate(text)},
        found.largest,
        *({n: (x / len(targets_T)).tolist() for n, x in sorted(load.items())} for load in loads),
    )


def _load(output: LayerOutput):
    return output.moe and output.moe.routing.load_E


def _targets(text: Mapping[str, Sequence[Batch]]) -> tuple[np.ndarray, np.ndarray]:
    """(targets of all valid tokens, number of the domain of each)."""
    targets, owners = [], []
    for number, batches in enumerate(text.values()):
        for batch in batches:
            own = batch["targets"][batch["segment_ids"] > 0]
            targets.append(own)
            owners.append(np.full(len(own), number))
    return np.concatenate(targets), np.concatenate(owners)


def _compared(found, bytes_T: np.ndarray, chosen_T: np.ndarray) -> Compared:
    before, after = (x[chosen_T].mean(dtype=np.float64) for x in (found.nll_T, found.other_nll_T))
    tokens = int(chosen_T.sum())
    bits = tokens / math.log(2) / max(1, int(bytes_T[chosen_T].sum()))
    return Compared(
        tokens=tokens,
        loss_before=float(before),
        loss_after=float(after),
        bits_before=float(before * bits),
        bits_after=float(after * bits),
        kl=float(found.kl_T[chosen_T].mean(dtype=np.float64)),
        agreement=float(found.agrees_T[chosen_T].mean()),
        difference=float(found.difference_T[chosen_T].max()),
    )
