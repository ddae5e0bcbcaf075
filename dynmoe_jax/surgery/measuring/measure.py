"""Before and after: losses of both models on held-out text, how far apart they are, and what their
routers do.

Axis legend: T tokens, E experts.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynmoe_jax.calibration.logits import logit_statistics
from dynmoe_jax.calibration.stream import streamed
from dynmoe_jax.data import Batch
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.layer import Layer


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
class Routed:
    """Work of the routers of a model on the text, by the number of the MoE layer.

    Attributes:
      load: share of the tokens that chose each expert.
      entropy: of the router's probabilities, mean over tokens, nats.
    """

    load: dict[int, list[float]]
    entropy: dict[int, float]

    @property
    def experts_per_token(self) -> float:
        """Mean over tokens and MoE layers; NaN in a dense model."""
        counts = [sum(shares) for shares in self.load.values()]
        return sum(counts) / len(counts) if counts else math.nan


@dataclasses.dataclass(frozen=True)
class Measured:
    """All of a comparison.

    Attributes:
      all: over all domains.
      domains: by domain.
      largest_logit: of the model before, by absolute value.
      routed_before: what the routers do.
      routed_after: the same of the result.
    """

    all: Compared
    domains: dict[str, Compared]
    largest_logit: float
    routed_before: Routed
    routed_after: Routed

    @property
    def relative_difference(self) -> float:
        """The largest difference, in units of the largest logit where that is above 1; NaN where a
        loss is no finite number."""
        # Maxima alone would not tell: on a CPU they pass over NaN.
        if not (math.isfinite(self.all.loss_before) and math.isfinite(self.all.loss_after)):
            return math.nan
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
    before, after = _InFloat32(before), _InFloat32(after)
    hidden, routed = zip(*(_passed(model, batches) for model in (before, after)), strict=True)
    found = logit_statistics(before, hidden[0], batches, (after, hidden[1]))
    targets_T, owner_T = _targets(text)
    bytes_T = token_bytes_V[targets_T]
    everywhere = np.ones(len(targets_T), bool)
    return Measured(
        _compared(found, bytes_T, everywhere),
        {name: _compared(found, bytes_T, owner_T == i) for i, name in enumerate(text)},
        found.largest,
        *routed,
    )


def _passed(model: Any, batches: Sequence[Batch]) -> tuple[list[np.ndarray], Routed]:
    """(what the output projection reads, what the routers do) of a model."""
    load: dict[int, np.ndarray] = {}
    entropy: dict[int, float] = {}

    def add(layer, _, found):
        load_E, of_tokens = found
        load[layer] = load.get(layer, 0) + load_E.astype(np.int64)
        entropy[layer] = entropy.get(layer, 0.0) + float(of_tokens)

    hidden = streamed(model, batches, lambda layer: _routing_sums, add)
    tokens = max(1, sum(int((batch["segment_ids"] > 0).sum()) for batch in batches))
    return hidden, Routed(
        {layer: (load[layer] / tokens).tolist() for layer in sorted(load)},
        {layer: entropy[layer] / tokens for layer in sorted(entropy)},
    )


def _routing_sums(
    layer: Layer, x_BLD: Array, positions: TokenPositions, batch: Mapping[str, Array]
):
    """(output of a layer, (tokens that chose each expert, sum of entropies) of an MoE layer)."""
    output = layer(x_BLD, positions)
    if output.moe is None:
        return output, None
    routing = output.moe.routing
    entropy_T = entropy_of(routing.probs_TE)
    valid_T = batch["segment_ids"].reshape(-1) > 0
    return output, (routing.load_E, jnp.sum(entropy_T, where=valid_T))


def entropy_of(probs_TE: Float[Array, "T E"]) -> Float[Array, "T"]:
    """Entropy of each token's scores, nats; scores that are no distribution are divided by their
    sum."""
    total_T1 = jnp.sum(probs_TE, axis=-1, keepdims=True)
    p_TE = probs_TE / jnp.where(total_T1 > 0, total_T1, 1.0)
    return -jnp.sum(p_TE * jnp.log(jnp.where(p_TE > 0, p_TE, 1.0)), axis=-1)


class _InFloat32:
    """An opened model that is computed in float32, in which a promise can be told from rounding."""

    def __init__(self, model: Any):
        cfg = model.config
        own = dataclasses.replace(cfg.model, dtype="float32")
        self.config, self._model = dataclasses.replace(cfg, model=own), model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


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
