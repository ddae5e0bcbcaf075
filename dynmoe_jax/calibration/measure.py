"""One layer computed, and its statistics with it, in one program: only sums and samples leave it.

Axis legend: B batch, L positions, T = B L tokens of a batch, R rows of all experts, b rows of a
block, E experts, D model width.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax.calibration.seen import SeenLayer, SeenRows
from dynmoe_jax.calibration.statistics.statistic import STATISTICS, UnitStatistic
from dynmoe_jax.experts.kernels.cpu.block_schedule import NOWHERE
from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.used_blocks import blocks_of, of_expert, rows_of
from dynmoe_jax.experts.weights import ExpertWeights
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.layer import Layer, LayerOutput

ExpertWork = tuple[Float[Array, "T D"], Rows, Mapping[str, Array]]
"""(tokens, rows, weights by the names of their parameters) that a backend was given."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """A probe that takes statistics of a layer; equal for equal names.

    Attributes:
      names: of the statistics.
    """

    names: tuple[str, ...]

    def __call__(
        self, layer: Layer, x_BLD: Float[Array, "B L D"], positions: TokenPositions, batch
    ) -> tuple[LayerOutput, dict[str, Array]]:
        """(output of the layer, its statistics by name)."""
        output, work = with_work(layer, x_BLD, positions)
        return output, taken(self.names, layer, output, work, batch)


def taken(
    names: tuple[str, ...],
    layer: Layer,
    output: LayerOutput,
    work: ExpertWork | None,
    batch: Mapping[str, Array],
    doutput_TD: Float[Array, "T D"] | None = None,
) -> dict[str, Array]:
    """Statistics of a layer by name.

    Args:
      names: of the statistics.
      layer: the module.
      output: its results.
      work: of its experts, from :func:`with_work`.
      batch: arrays of the batch.
      doutput_TD: the gradient of the loss by what the feed-forward adds to the stream.
    """
    seen = SeenLayer(layer, output, work and work[1], batch)
    statistics = {name: STATISTICS[name]() for name in names}
    of_units = {n: s for n, s in statistics.items() if isinstance(s, UnitStatistic)}
    found = {n: s.of_layer(seen) for n, s in statistics.items() if n not in of_units}
    if of_units and work is None:
        feed_forward = layer.feed_forward
        functions = feed_forward.hidden, feed_forward.output
        rows = SeenRows(seen.input_TD, seen.valid_T, *functions, doutput_TD)
        found |= {name: statistic.of_rows(rows) for name, statistic in of_units.items()}
    elif of_units:
        found |= _of_experts(of_units, layer.feed_forward.kind, work, doutput_TD)
    return found


class _Watched:
    """A backend that remembers what it was given."""

    def __init__(self, backend):
        self.backend, self.work = backend, None

    def __call__(self, x_TD, rows, weights):
        self.work = x_TD, rows, _by_name(weights)
        return self.backend(x_TD, rows, weights)


def with_work(
    layer: Layer, x_BLD: Float[Array, "B L D"], positions: TokenPositions
) -> tuple[LayerOutput, ExpertWork | None]:
    """(output of a layer, what its experts had to do; None in a dense layer)."""
    if not layer.is_moe:
        return layer(x_BLD, positions), None
    # Of its own, so that the layer keeps its backend.
    layer = nnx.merge(*nnx.split(layer))
    watched = _Watched(layer.feed_forward.backend)
    layer.feed_forward.backend = watched
    return layer(x_BLD, positions), watched.work


def _by_name(weights: Any) -> dict[str, Array]:
    if isinstance(weights, ExpertWeights):
        return {"gate_up_ED2F": weights.gate_up_ED2F, "down_EFD": weights.down_EFD}
    return dict(weights)


def _of_experts(
    statistics: Mapping[str, UnitStatistic],
    kind,
    work: ExpertWork,
    doutput_TD: Float[Array, "T D"] | None,
) -> dict[str, Array]:
    """Statistics of hidden units, of each expert, over the blocks of its rows."""
    x_TD, rows, weights = work

    def of_block(e, token_b, weight_b):
        of_one = of_expert(weights, e)
        doutput_bD = None
        if doutput_TD is not None:
            doutput_bD = weight_b[:, None] * rows_of(doutput_TD, token_b).astype(jnp.float32)
        functions = partial(kind.hidden, of_one), partial(kind.output, of_one)
        block = SeenRows(rows_of(x_TD, token_b), token_b != NOWHERE, *functions, doutput_bD)
        return {name: statistic.of_rows(block) for name, statistic in statistics.items()}

    def add_block(totals, e, start, token_b, weight_b):
        more = of_block(e, token_b, weight_b)
        return {name: total_E.at[e].add(more[name]) for name, total_E in totals.items()}

    shapes = jax.eval_shape(of_block, 0, rows.token_R[:1], rows.weight_R[:1])
    experts = rows.group_size_E.shape
    zeros = {name: jnp.zeros(experts + x.shape, jnp.float32) for name, x in shapes.items()}
    blocks = blocks_of(x_TD, rows.weight_R, rows.token_R, rows.group_size_E)
    return blocks.fold(add_block, zeros)
