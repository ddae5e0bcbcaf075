"""A batch passed through a decoder layer by layer, to look at what each layer computes.

Layers are computed one group after another, not scanned, so that their results can leave.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import jax
from flax import nnx
from jaxtyping import Array

from dynmoe_jax.model.decoder import Decoder
from dynmoe_jax.model.layer import LayerOutput

Tapped = TypeVar("Tapped")


def walk(
    decoder: Decoder, batch: Mapping[str, Array], taps: Callable[[LayerOutput], Tapped]
) -> Iterator[tuple[int, Tapped]]:
    """Yields (layer number, ``taps`` of its output) for every layer, in order.

    Args:
      decoder: the model.
      batch: ``tokens``, ``segment_ids`` (0 is padding) and ``positions``, each [B, L].
      taps: picks or reduces results of a layer; compiled with it, so that only what it returns is
        computed and leaves.
    """
    positions = decoder.positions(batch["segment_ids"], batch["positions"], batch["tokens"])
    x_BLD, number = decoder.embed(batch["tokens"]), 0
    for structure, params in groups_of(decoder):
        x_BLD, positions, tapped = _compute_group(structure, taps, params, x_BLD, positions)
        for result in tapped:
            yield number, result
            number += 1


def groups_of(decoder: Decoder) -> Iterator[tuple[nnx.GraphDef, nnx.State]]:
    """Yields (structure, parameters) of every group of layers, in the order of computation."""
    for stack in decoder.stacks:
        structure, params = nnx.split(stack)
        for group in range(jax.tree.leaves(params)[0].shape[0]):
            yield structure, jax.tree.map(lambda x, g=group: x[g], params)


@partial(jax.jit, static_argnums=(0, 1))
def _compute_group(structure, taps, params, x_BLD, positions):
    tapped = []
    for layer in nnx.merge(structure, params).layers:
        output = layer(x_BLD, positions)
        x_BLD, positions = output.x_BLD, positions.with_previous(output.previous_BLS)
        tapped.append(taps(output))
    return x_BLD, positions, tapped
