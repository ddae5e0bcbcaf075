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

from dynmoe_jax.calibration.seen import SeenLayer, SeenRows, mix_and_keep
from dynmoe_jax.calibration.statistics.statistic import STATISTICS, Statistic, UnitStatistic
from dynmoe_jax.experts.backend import GROUPED, Backend
from dynmoe_jax.experts.kernels.cpu.block_matmul import scatter_add
from dynmoe_jax.experts.kernels.cpu.block_schedule import NOWHERE
from dynmoe_jax.experts.kinds.kind import ExpertKind
from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.used_blocks import blocks_of, of_expert, rows_of
from dynmoe_jax.experts.weights import ExpertWeights
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.layer import Layer, LayerOutput

DROPLESS = (*GROUPED, "reference")
"""Backends whose results do not depend on how rows are cut."""

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
        of_units = {name: each for name, each in _made(self.names) if _is_of_units(each)}
        if not of_units or not layer.is_moe or layer.feed_forward.moe.backend not in DROPLESS:
            output, work = with_work(layer, x_BLD, positions)
            return output, taken(self.names, layer, x_BLD, output, work, batch)
        counting = _Counting(layer.feed_forward.kind, of_units)
        output = _with_backend(layer, counting)(x_BLD, positions, mix_and_keep)
        others = tuple(name for name in self.names if name not in of_units)
        rest = taken(others, layer, x_BLD, output, counting.work, batch)
        return output, counting.found | rest


def taken(
    names: tuple[str, ...],
    layer: Layer,
    x_BLD: Float[Array, "B L D"],
    output: LayerOutput,
    work: ExpertWork | None,
    batch: Mapping[str, Array],
    doutput_TD: Float[Array, "T D"] | None = None,
) -> dict[str, Array]:
    """Statistics of a layer by name.

    Args:
      names: of the statistics.
      layer: the module.
      x_BLD: the residual stream in front of it.
      output: its results.
      work: of its experts, from :func:`with_work`.
      batch: arrays of the batch.
      doutput_TD: the gradient of the loss by what the feed-forward adds to the stream.
    """
    seen = SeenLayer(layer, x_BLD, output, work and work[1], batch)
    of_units = {name: each for name, each in _made(names) if _is_of_units(each)}
    found = {name: each.of_layer(seen) for name, each in _made(names) if name not in of_units}
    if of_units and work is None:
        feed_forward = layer.feed_forward
        functions = feed_forward.hidden, feed_forward.output
        rows = SeenRows(seen.input_TD, seen.valid_T, *functions, doutput_TD)
        found |= {name: statistic.of_rows(rows) for name, statistic in of_units.items()}
    elif of_units:
        found |= folded(of_units, layer.feed_forward.kind, work, doutput_TD)[0]
    return found


def _made(names: tuple[str, ...]) -> list[tuple[str, Statistic]]:
    return [(name, STATISTICS[name]()) for name in names]


def _is_of_units(statistic: Statistic) -> bool:
    return isinstance(statistic, UnitStatistic)


class _Watched:
    """A backend that remembers what it was given."""

    def __init__(self, backend):
        self.backend, self.work = backend, None

    def __call__(self, x_TD, rows, weights):
        self.work = x_TD, rows, _by_name(weights)
        return self.backend(x_TD, rows, weights)


class _Counting:
    """A backend that takes statistics of the rows that it computes.

    Kernels keep hidden units to themselves: after one, all but everything would be computed again.
    """

    def __init__(self, kind: ExpertKind, statistics: Mapping[str, UnitStatistic]):
        self.kind, self.statistics = kind, statistics
        self.work, self.found = None, {}

    def __call__(self, x_TD, rows, weights):
        self.work = x_TD, rows, _by_name(weights)
        self.found, y_TD = folded(self.statistics, self.kind, self.work, with_outputs=True)
        return y_TD.astype(x_TD.dtype), jnp.zeros((), jnp.int32)


def with_work(
    layer: Layer, x_BLD: Float[Array, "B L D"], positions: TokenPositions
) -> tuple[LayerOutput, ExpertWork | None]:
    """(output of a layer, what its experts had to do; None in a dense layer)."""
    if not layer.is_moe:
        return layer(x_BLD, positions, mix_and_keep), None
    watched = _Watched(layer.feed_forward.backend)
    return _with_backend(layer, watched)(x_BLD, positions, mix_and_keep), watched.work


def _with_backend(layer: Layer, backend: Backend) -> Layer:
    """The layer with another backend; the given one keeps its own."""
    layer = nnx.merge(*nnx.split(layer))
    layer.feed_forward.backend = backend
    return layer


def _by_name(weights: Any) -> dict[str, Array]:
    if isinstance(weights, ExpertWeights):
        return {"gate_up_ED2F": weights.gate_up_ED2F, "down_EFD": weights.down_EFD}
    return dict(weights)


def folded(
    statistics: Mapping[str, UnitStatistic],
    kind: ExpertKind,
    work: ExpertWork,
    doutput_TD: Float[Array, "T D"] | None = None,
    with_outputs: bool = False,
) -> tuple[dict[str, Array], Float[Array, "T D"] | None]:
    """(statistics of each expert's hidden units, sum of the experts' outputs), over blocks of rows.

    Args:
      statistics: by name.
      kind: of the experts.
      work: what they have to do.
      doutput_TD: the gradient of the loss by the sum of their outputs, if needed.
      with_outputs: whether that sum is wanted, float32; else it is None.
    """
    x_TD, rows, weights = work

    def block_of(e, token_b, weight_b):
        of_one = of_expert(weights, e)
        doutput_bD = None
        if doutput_TD is not None:
            doutput_bD = weight_b[:, None] * rows_of(doutput_TD, token_b).astype(jnp.float32)
        functions = partial(kind.hidden, of_one), partial(kind.output, of_one)
        return SeenRows(rows_of(x_TD, token_b), token_b != NOWHERE, *functions, doutput_bD)

    def sums_of(block):
        return {name: statistic.of_rows(block) for name, statistic in statistics.items()}

    def add_block(carry, e, start, token_b, weight_b):
        totals, y_TD = carry
        block = block_of(e, token_b, weight_b)
        if with_outputs:
            weighed_bD = block.output_RD.astype(jnp.float32) * weight_b[:, None]
            y_TD = scatter_add(y_TD, token_b, weighed_bD)
        more = sums_of(block)
        return {name: total_E.at[e].add(more[name]) for name, total_E in totals.items()}, y_TD

    experts = rows.group_size_E.shape
    one_row = 0, rows.token_R[:1], rows.weight_R[:1]
    shapes = jax.eval_shape(lambda *of_block: sums_of(block_of(*of_block)), *one_row)
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    totals = {name: zeros(experts + shape.shape) for name, shape in shapes.items()}
    blocks = blocks_of(x_TD, rows.weight_R, rows.token_R, rows.group_size_E)
    return blocks.fold(add_block, (totals, zeros(x_TD.shape) if with_outputs else None))
