"""A second sweep over the layers, from the top down, that takes gradients of the loss along.

The inputs of all groups of layers were kept by the first one; each group is read once more, and
computed again.

Axis legend: B batch, L positions, T = B L tokens of a batch, D model width.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from dynmoe_jax.calibration.groups import groups_of, read_norm
from dynmoe_jax.calibration.logits import Hidden, loss_gradients
from dynmoe_jax.calibration.measure import Measure, taken, with_work
from dynmoe_jax.calibration.stream import Batch, Fold, Stream, token_positions
from dynmoe_jax.console import stage
from dynmoe_jax.model.components import compute_dtype
from dynmoe_jax.runs.load import OpenedRun

Gradient = tuple[Float[np.ndarray, "B L D"], Float[np.ndarray, "B L S"] | None]
"""Of the loss, by the :data:`~dynmoe_jax.calibration.stream.Stream` of a batch."""


def sweep_back(
    run: OpenedRun,
    batches: Sequence[Batch],
    hidden: Hidden,
    kept: list[list[Stream]],
    measure_of: Callable[[int], Measure],
    fold: Fold,
) -> None:
    """Takes statistics that need gradients of the loss, the sum over all valid targets.

    Args:
      run: the model, as it lies on disk.
      batches: with ``targets``.
      hidden: the normed streams behind the last layer.
      kept: the streams in front of each group, and behind the last one; emptied on the way.
      measure_of: what to take of a layer, by its number; layers below the first of which something
        is taken are not computed.
      fold: is given what was found.
    """
    model = run.config.model
    gradients = _behind_layers(run, batches, hidden, kept.pop())
    groups = list(groups_of(model))
    first = min(layer for layer in range(model.num_layers) if measure_of(layer).names)
    with stage("Passing gradients back through the layers", model.num_layers, "layers") as shown:
        for group in reversed(groups):
            if group.layers[-1] < first:
                break
            streams, measures = kept.pop(), tuple(measure_of(layer) for layer in group.layers)
            params = group.read(run)
            for number, batch in enumerate(batches):
                arguments = params, batch, streams[number], gradients[number]
                result = _back_through(group.structure, model, measures, *arguments)
                gradients[number], found = jax.device_get(result)
                for layer, of_layer in zip(group.layers, found, strict=True):
                    fold(layer, number, of_layer)
                shown.advance(len(group.layers) / len(batches))
            del params, arguments  # before the next group is read


def _behind_layers(run, batches, hidden: Hidden, streams: list[Stream]) -> list[Gradient]:
    """Gradients by what leaves the last layer."""
    structure, params = read_norm(run)
    by_normed = loss_gradients(run, hidden, batches)
    dtype = compute_dtype(run.config.model)
    gradients = []
    for (x_BLD, previous_BLS), dnormed_BLD in zip(streams, by_normed, strict=True):
        dx_BLD = np.asarray(_back_through_norm(structure, dtype, params, x_BLD, dnormed_BLD))
        gradients.append((dx_BLD, None if previous_BLS is None else np.zeros_like(previous_BLS)))
    return gradients


@partial(jax.jit, static_argnums=(0, 1))
def _back_through_norm(structure, dtype, params, x_BLD, dnormed_BLD):
    def norm(x_BLD):
        return nnx.merge(structure, params)(x_BLD.astype(dtype)).astype(jnp.float32)

    return jax.vjp(norm, x_BLD)[1](dnormed_BLD)[0]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _back_through(structure, model, measures, params, batch, stream, gradient):
    """(gradient by what goes into a group of layers, statistics of each)."""
    positions, dtype = token_positions(model, batch), compute_dtype(model)

    def compute(layer, stream):
        # Merged here: a module belongs to the trace that it was made in.
        layer = nnx.merge(*layer)
        x_BLD, previous_BLS = stream
        output, work = with_work(layer, x_BLD.astype(dtype), positions.with_previous(previous_BLS))
        return (output.x_BLD.astype(jnp.float32), output.previous_BLS), (output, work)

    layers = [nnx.split(layer) for layer in nnx.merge(structure, params).layers]
    streams = [stream]
    for layer in layers[:-1]:
        streams.append(compute(layer, streams[-1])[0])
    found = []
    for layer, stream, measure in zip(*map(reversed, (layers, streams, measures)), strict=True):
        _, transpose, (output, work) = jax.vjp(partial(compute, layer), stream, has_aux=True)
        doutput_TD = gradient[0].reshape(-1, gradient[0].shape[-1])
        x_BLD = stream[0].astype(dtype)
        taken_of = measure.names, nnx.merge(*layer), x_BLD, output, work, batch, doutput_TD
        found.append(taken(*taken_of))
        (gradient,) = transpose(gradient)
    return gradient, found[::-1]
