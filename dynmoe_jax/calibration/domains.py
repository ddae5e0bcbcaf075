"""Loss and use of experts by domain, of a model on disk: one pass for all domains.

Axis legend: B batch, L positions, D model width, V vocabulary, E experts.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from dynmoe_jax.calibration.logits import Hidden, logit_statistics
from dynmoe_jax.calibration.stream import Batch, forward
from dynmoe_jax.model.layer import LayerOutput
from dynmoe_jax.runs.load import OpenedRun


@dataclasses.dataclass
class DomainSums:
    """Sums over the valid tokens of one domain.

    Attributes:
      nll: negative log-likelihood of the targets, nats.
      tokens: targets.
      bytes: of UTF-8 that the targets stand for.
      load: tokens that chose each expert, by the number of the MoE layer.
    """

    nll: float
    tokens: int
    bytes: int
    load: dict[int, Int[np.ndarray, "E"]]

    @property
    def experts_per_token(self) -> dict[int, float]:
        """Mean of each MoE layer, by its number."""
        return {n: float(load_E.sum()) / max(1, self.tokens) for n, load_E in self.load.items()}


@dataclasses.dataclass(frozen=True)
class HeldOutSums:
    """Sums by domain, and what other questions about the same text can begin with.

    Attributes:
      domains: the sums, by the domain's name.
      hidden: the normed residual stream of the batches of each domain.
    """

    domains: dict[str, DomainSums]
    hidden: dict[str, Hidden]


def heldout_by_domain(
    run: OpenedRun,
    batches_by_domain: Mapping[str, Sequence[Batch]],
    token_bytes_V: Int[np.ndarray, "V"],
) -> HeldOutSums:
    """Measures a model on the batches of every domain.

    Args:
      run: the model, as it lies on disk.
      batches_by_domain: packed batches by the domain's name.
      token_bytes_V: bytes that each token stands for.
    """
    owners = [name for name, batches in batches_by_domain.items() for _ in batches]
    batches = [batch for batches in batches_by_domain.values() for batch in batches]
    load: dict[str, dict[int, np.ndarray]] = {name: {} for name in batches_by_domain}

    def add(layer, number, load_E):
        of_domain = load[owners[number]]
        of_domain[layer] = of_domain.get(layer, 0) + load_E.astype(np.int64)

    hidden = forward(run, batches, _load, add)
    by_domain = {
        name: [x for x, owner in zip(hidden, owners, strict=True) if owner == name]
        for name in batches_by_domain
    }
    nll = logit_statistics(run, hidden, batches).nll_T
    domains, done = {}, 0
    for name, own in batches_by_domain.items():
        targets = _valid_targets(own)
        part = nll[done : done + len(targets)]
        done += len(targets)
        total = float(part.sum(dtype=np.float64))
        domains[name] = DomainSums(total, len(part), int(token_bytes_V[targets].sum()), load[name])
    return HeldOutSums(domains, by_domain)


def _load(output: LayerOutput):
    return output.moe and output.moe.routing.load_E


def _valid_targets(batches: Sequence[Batch]) -> Int[np.ndarray, "T"]:
    parts = [batch["targets"][batch["segment_ids"] > 0] for batch in batches]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
