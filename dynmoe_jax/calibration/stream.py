"""A forward pass over many batches with the layers outside: each group of layers is read once.

The hidden states of all batches lie on the host, in float32.  At no time are there parameters of
more than one group of layers, or, before and behind them, the embedding or the output projection.

Axis legend: B batch, L positions, D model width, V vocabulary, S scores of a router.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax import config
from dynmoe_jax.calibration.groups import Group, groups_of, read_norm, shapes_of
from dynmoe_jax.console import Stage, stage
from dynmoe_jax.model.components import compute_dtype
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.layer import Layer, LayerOutput
from dynmoe_jax.runs.load import OpenedRun

Batch = Mapping[str, np.ndarray]
"""``tokens``, ``segment_ids`` (0 is padding), ``positions`` and, where losses are computed,
``targets``, each [B, L]; and what else a probe reads."""

Taps = Callable[[LayerOutput], Any]
"""Picks or reduces results of a layer: a tree of arrays, or None."""

Probe = Callable[[Layer, Array, TokenPositions, Mapping[str, Array]], tuple[LayerOutput, Any]]
"""``(layer, x_BLD, positions, the batch) -> (its output, tree of arrays)``: computes a layer and
looks at it.  Equal ones share what is compiled."""

Fold = Callable[[int, int, Any], None]
"""``(number of the layer, number of the batch, what was picked)``, which is on the host."""

Stream = tuple[Float[np.ndarray, "B L D"], Float[np.ndarray, "B L S"] | None]
"""The hidden states of a batch, and router logits that the next layer may read."""


def forward(
    run: OpenedRun,
    batches: Sequence[Batch],
    taps: Taps | None = None,
    fold: Fold | None = None,
) -> list[Float[np.ndarray, "B L D"]]:
    """Passes batches through all of a model but the output projection.

    Args:
      run: the model, as it lies on disk.
      batches: of any number, all of which stay on the host.
      taps: picks or reduces results of a layer; compiled with it, so that only what it returns is
        computed and leaves.
      fold: is given what ``taps`` returned of every layer and batch, layer by layer.

    Returns:
      the normed residual stream of each batch, float32.
    """
    probe = Tapped(taps or pick_nothing)
    return streamed(run, batches, lambda layer: probe, fold)


def pick_nothing(output: LayerOutput) -> None:
    """Taps of a pass of which nothing is wanted but what leaves the last layer."""


def streamed(
    run: OpenedRun,
    batches: Sequence[Batch],
    probe_of: Callable[[int], Probe],
    fold: Fold | None = None,
    keep: Callable[[list[Stream]], None] | None = None,
) -> list[Float[np.ndarray, "B L D"]]:
    """:func:`forward` with more to look at.

    Args:
      run: the model, as it lies on disk.
      batches: of any number.
      probe_of: the probe of a layer, by its number.
      fold: is given what it found.
      keep: is given the streams in front of each group, and those behind the last one.
    """
    model = run.config.model
    streams, keep = _embedded(run, batches), keep or (lambda streams: None)
    with stage("Passing text through the layers", model.num_layers, "layers") as shown:
        for group in groups_of(model):
            keep(list(streams))
            probes = tuple(probe_of(layer) for layer in group.layers)
            _pass_group(run, group, batches, streams, probes, fold, shown)
    keep(list(streams))
    return _normed(run, streams)


def token_positions(model: config.Model, batch: Mapping[str, Array]) -> TokenPositions:
    """The tokens of a batch, as layers read them."""
    names = ("segment_ids", "positions", "tokens")
    return shapes_of(model).positions(*(batch[name] for name in names))


@dataclasses.dataclass(frozen=True)
class Tapped:
    """Taps as a probe; equal for equal taps.

    Attributes:
      taps: see :data:`Taps`.
    """

    taps: Taps

    def __call__(self, layer: Layer, x_BLD: Array, positions: TokenPositions, batch):
        """(output of the layer, what the taps pick of it)."""
        output = layer(x_BLD, positions)
        return output, self.taps(output)


def _embedded(run: OpenedRun, batches: Sequence[Batch]) -> list[Stream]:
    """Inputs of the first layer."""
    model = run.config.model
    table_VD = run.read(("embedding_VD",))
    if model.mask_steps:
        table_VD = table_VD * run.read(("norm", "mask_D"))
    return [
        (table_VD[batch["tokens"]].astype(np.float32), _no_previous(model, batch))
        for batch in batches
    ]


def _no_previous(model: config.Model, batch: Batch) -> Float[np.ndarray, "B L S"] | None:
    """Router logits in front of the first layer; None where no router reads any."""
    arrays = {name: batch[name] for name in ("segment_ids", "positions", "tokens")}
    shape = jax.eval_shape(partial(token_positions, model), arrays).previous_BLS
    return None if shape is None else np.zeros(shape.shape, np.float32)


def _pass_group(
    run: OpenedRun,
    group: Group,
    batches: Sequence[Batch],
    streams: list[Stream],
    probes: tuple[Probe, ...],
    fold: Fold | None,
    shown: Stage,
) -> None:
    """Replaces each stream by what leaves the group.  Its parameters are dropped at the end."""
    compute = partial(_compute_group, group.structure, run.config.model, probes, group.read(run))

    def settle(number, result):
        streams[number], tapped = jax.device_get(result)
        for layer, found in zip(group.layers, tapped, strict=True):
            if fold is not None and found is not None:
                fold(layer, number, found)
        shown.advance(len(group.layers) / len(batches))

    under_way = None
    for number, batch in enumerate(batches):
        result = compute(batch, streams[number])
        if under_way:  # the device computes the next batch while the host folds this one
            settle(*under_way)
        under_way = number, result
    if under_way:
        settle(*under_way)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _compute_group(structure, model, probes, params, batch, stream):
    """(what leaves a group of layers, what its probe found in each)."""
    x_BLD, previous_BLS = stream
    x_BLD, found = x_BLD.astype(compute_dtype(model)), []
    positions = token_positions(model, batch).with_previous(previous_BLS)
    for layer, probe in zip(nnx.merge(structure, params).layers, probes, strict=True):
        output, of_layer = probe(layer, x_BLD, positions, batch)
        found.append(of_layer)
        x_BLD, positions = output.x_BLD, positions.with_previous(output.previous_BLS)
    return (x_BLD.astype(jnp.float32), positions.previous_BLS), found


def _normed(run: OpenedRun, streams: list[Stream]) -> list[Float[np.ndarray, "B L D"]]:
    """Inputs of the output projection, in place of the streams."""
    structure, params = read_norm(run)
    dtype = compute_dtype(run.config.model)
    normed = []
    while streams:
        normed.append(np.asarray(_norm(structure, params, streams.pop(0)[0], dtype)))
    return normed


@partial(jax.jit, static_argnums=(0, 3))
def _norm(structure, params, x_BLD, dtype):
    return nnx.merge(structure, params)(x_BLD.astype(dtype)).astype(jnp.float32)
