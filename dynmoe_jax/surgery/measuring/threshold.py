"""Threshold of top-p that gives a model the mean number of experts that was asked for.

Axis legend: T tokens, E experts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dynmoe_jax import config
from dynmoe_jax.calibration.stream import forward
from dynmoe_jax.data import Batch
from dynmoe_jax.edits.settings import edited
from dynmoe_jax.model.layer import LayerOutput
from dynmoe_jax.runs.checkpoint import replace_config
from dynmoe_jax.runs.load import opened_run

ROUNDS = 4
TOLERANCE = 0.01
"""Share by which the mean may be off, before p is moved once more: experts that were chosen change
what the layers behind them are given."""


def fit_threshold(
    folder: Path, cfg: config.Config, text: Mapping[str, Sequence[Batch]], experts: float
) -> config.Config:
    """Moves p of a model until tokens use so many experts on average over layers.

    Args:
      folder: of the run, whose checkpoint gets the new p.
      cfg: its settings, with one top-p router for all layers.
      text: batches by domain.
      experts: mean experts of a token that is wanted.

    Returns:
      the settings with the p that was found.
    """
    batches = [batch for own in text.values() for batch in own]
    for _ in range(ROUNDS):
        with opened_run(folder, verify=False) as run:
            before = mass_before(run, batches)
        if abs(mean_experts(before, cfg.model.moe.top_p.threshold) / experts - 1) <= TOLERANCE:
            break
        cfg = edited(cfg, {"model.moe.top_p.threshold": threshold_for(before, experts)})
        replace_config(folder, 0, cfg)
    return cfg


def mass_before(run: Any, batches: Sequence[Batch]) -> list[np.ndarray]:
    """Probability of the experts before each one in a token's order, [T, E] of every MoE layer and
    batch: an expert is used while it is at most p."""
    found = []

    def fold(_, number, mass_TE):
        found.append(mass_TE[batches[number]["segment_ids"].reshape(-1) > 0])

    forward(run, batches, _mass, fold)
    return found


def _mass(output: LayerOutput):
    if output.moe is None:
        return None
    probs_TE = -jnp.sort(-output.moe.routing.probs_TE, axis=-1)
    return jnp.cumsum(probs_TE, axis=-1) - probs_TE


def mean_experts(before: Sequence[np.ndarray], p: float) -> float:
    """Mean experts of a token at a threshold."""
    tokens = sum(len(mass_TE) for mass_TE in before)
    return sum(int((mass_TE <= np.float32(p)).sum()) for mass_TE in before) / tokens


def threshold_for(before: Sequence[np.ndarray], experts: float) -> float:
    """The threshold at which the mean is the nearest to what is wanted."""
    tokens = sum(len(mass_TE) for mass_TE in before)
    # As many pairs of a token and an expert have to be used.
    rank = round(experts * tokens)
    mass = np.concatenate([mass_TE.ravel() for mass_TE in before])
    if rank >= len(mass):
        return 1.0
    low, high = np.partition(mass, [rank - 1, rank])[[rank - 1, rank]]
    return float(np.clip((low + high) / 2, 1e-6, 1.0))
