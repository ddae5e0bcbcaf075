"""Which arrays of a step hold numbers that are not finite, in the order of their computation.

Axis legend: B batch, L positions, T = B L tokens, D model width, V vocabulary.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax import config
from dynmoe_jax.model import Decoder
from dynmoe_jax.model.cross_entropy import cross_entropy_sums
from dynmoe_jax.training.step import Batch, TrainState


@dataclasses.dataclass(frozen=True)
class Place:
    """One array.

    Attributes:
      name: what it is, e.g. ``"layer 3: router logits"``.
      size: how many numbers it has.
      bad: how many of them are NaN or infinite.
      largest: magnitude of the largest of the others; 0 if there are none.
    """

    name: str
    size: int
    bad: int
    largest: float

    @classmethod
    def of(cls, name: str, array: Array) -> "Place":
        """The place of an array."""
        finite = jnp.isfinite(array)
        largest = jnp.max(jnp.where(finite, jnp.abs(array), 0), initial=0)
        return cls(name, array.size, int(array.size - jnp.sum(finite)), float(largest))


def state_places(state: TrainState) -> list[Place]:
    """Parameters and the optimizer's moments, by layer."""
    named = {"parameter": state.params, "optimizer": state.optimizer}
    return [
        Place.of(f"{kind} {name}", array)
        for kind, tree in named.items()
        for name, array in _by_layer(tree)
    ]


def forward_places(
    decoder: Decoder, batch: Batch, loss: config.Loss
) -> tuple[list[Place], Float[Array, "B L"]]:
    """(what a forward pass computes, negative log-likelihood of every position).

    The layers are walked through one after another, not scanned, so that what lies between them
    can be looked at.  Padding is left out: it may hold anything.
    """
    valid_BL = batch["segment_ids"] > 0
    places = []

    def look(name: str, array: Array, mask: Array = valid_BL) -> None:
        mask = mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
        places.append(Place.of(name, jnp.where(mask, array, 0)))

    x_BLD = decoder.embed(batch["tokens"])
    look("embedding", x_BLD)
    for number, layer in enumerate(_layers(decoder)):
        x_BLD = layer.attend(x_BLD, batch["segment_ids"], batch["positions"])
        look(f"layer {number}: after attention", x_BLD)
        x_BLD, routed = layer.feed(x_BLD, batch["segment_ids"])
        if routed is not None:
            look(f"layer {number}: router logits", routed[0].logits_TE, valid_BL.reshape(-1))
        look(f"layer {number}: after feed-forward", x_BLD)
    x_BLD = decoder.norm(x_BLD)
    look("last norm", x_BLD)
    _, nll_BL = cross_entropy_sums(
        x_BLD, decoder.output_DV, batch["targets"], valid_BL, chunk_tokens=loss.chunk_tokens
    )
    look("loss of each token", nll_BL)
    return places, nll_BL


def backward_places(gradients: nnx.State) -> list[Place]:
    """Gradients by parameter and layer, in the order in which backward computes them."""
    # The feed-forward of a layer before its attention: by name, from the end of the alphabet.
    named = sorted(_by_layer(gradients), key=lambda item: item[0], reverse=True)
    return [Place.of(*item) for item in sorted(named, key=lambda item: _distance(item[0]))]


def _layers(decoder: Decoder) -> Iterator[nnx.Module]:
    """The decoder's layers, unstacked."""
    structure, params = nnx.split(decoder.groups)
    for number in range(jax.tree.leaves(params)[0].shape[0]):
        group = nnx.merge(structure, jax.tree.map(lambda x, n=number: x[n], params))
        yield from group.layers


def _by_layer(tree) -> Iterator[tuple[str, Array]]:
    """(name, array) of every leaf that is not a counter; those stacked over layers one by one."""
    leaves = jax.tree.leaves_with_path(tree)
    stride = 1 + max((_place_in_group(path) for path, _ in leaves), default=0)
    for path, array in leaves:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        name = _name(path)
        if _place_in_group(path) < 0:
            yield name, array
            continue
        for number, part in enumerate(array):
            yield f"layer {number * stride + _place_in_group(path)}: {name}", part


def _place_in_group(path) -> int:
    """Which layer of its group a leaf belongs to; -1 for what is not in a layer."""
    found = re.search(r"'layers'\]\[(\d+)\]", jax.tree_util.keystr(path))
    return int(found[1]) if found else -1


def _name(path) -> str:
    """``.mu['groups']['layers'][0]['attention']['query_DHW']`` as ``mu attention query_DHW``."""
    parts = re.findall(r"[A-Za-z_][A-Za-z_0-9]*", jax.tree_util.keystr(path))
    return " ".join(
        part for part in parts if part not in ("groups", "layers", "value", "raw_value")
    )


def _distance(name: str) -> float:
    """How far from the loss a parameter is: the output first, the embedding last."""
    if name.startswith("layer "):
        return -int(name.split()[1].rstrip(":"))
    return math.inf if name.startswith("embedding") else -math.inf
