"""Report of the arrays of a step that hold numbers that are not finite, in the order of their
computation.

Axis legend: B batch, L positions, T = B L tokens, N groups of layers.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dynmoe_jax import config
from dynmoe_jax.model import Decoder
from dynmoe_jax.model.kernels.cross_entropy.chunked import cross_entropy_sums
from dynmoe_jax.model.layer import LayerOutput
from dynmoe_jax.model.stacks import stacks_of
from dynmoe_jax.model.walk import walk
from dynmoe_jax.training.objectives import Batch
from dynmoe_jax.training.step import TrainState

_UNNAMED = re.compile("first_groups|groups|stack_[0-9]+|layers|value")

Tally = tuple[Array, Array]
"""(how many numbers are not finite, magnitude of the largest of the others)."""


@dataclasses.dataclass(frozen=True)
class ArrayCheck:
    """One array, looked through for numbers that are not finite.

    Attributes:
      name: what it is, e.g. ``"layer 3: router logits"``.
      bad: how many of its numbers are NaN or infinite.
      largest: magnitude of the largest of the others; 0 if there are none.
    """

    name: str
    bad: int
    largest: float


def check_state(state: TrainState, model: config.Model) -> list[ArrayCheck]:
    """Parameters and the optimizer's moments, by layer."""
    return [
        *_check_leaves(state.params, "parameter", model),
        *_check_leaves(state.optimizer, "optimizer", model),
    ]


def check_loss(parts: dict[str, Float[Array, ""]]) -> list[ArrayCheck]:
    """The parts of a loss."""
    return [ArrayCheck(name, *_plain(_tally(value))) for name, value in parts.items()]


def check_backward(gradients: nnx.State, model: config.Model) -> list[ArrayCheck]:
    """Gradients by parameter and layer, in the order in which backward computes them."""
    # The feed-forward of a layer before its attention: by name, from the end of the alphabet.
    named = sorted(
        _check_leaves(gradients, "", model), key=lambda checked: checked.name, reverse=True
    )
    return sorted(named, key=lambda checked: _distance(checked.name))


def check_forward(
    decoder: Decoder, batch: Batch, loss: config.Loss
) -> tuple[list[ArrayCheck], Float[Array, "B L"]]:
    """Checks the arrays of a forward pass, layer by layer.

    Returns them, and the negative log-likelihood of every position.

    Padding is left out: it may hold anything.
    """
    valid_BL = batch["segment_ids"] > 0
    names = ("after attention", "router logits", "after feed-forward")

    def tallies(output: LayerOutput):
        routing = output.routing
        return (
            _tally(output.attended_BLD, valid_BL),
            routing and _tally(routing.logits_TE, valid_BL.reshape(-1)),
            _tally(output.x_BLD, valid_BL),
        ), output.x_BLD

    x_BLD = decoder.embed(batch["tokens"])
    checked = [ArrayCheck("embedding", *_plain(_tally(x_BLD, valid_BL)))]
    for number, (tallies_of_layer, last_BLD) in walk(decoder, batch, tallies):
        x_BLD = last_BLD
        named = zip(names, tallies_of_layer, strict=True)
        checked += [
            ArrayCheck(f"layer {number}: {name}", *_plain(tally)) for name, tally in named if tally
        ]
    x_BLD = decoder.norm(x_BLD)
    checked.append(ArrayCheck("last norm", *_plain(_tally(x_BLD, valid_BL))))
    _, nll_BL = cross_entropy_sums(
        x_BLD,
        decoder.output_DV,
        batch["targets"],
        valid_BL,
        chunk_tokens=loss.chunk_tokens,
        plain=decoder.config.plain,
    )
    checked.append(ArrayCheck("loss of each token", *_plain(_tally(nll_BL, valid_BL))))
    return checked, nll_BL


def _tally(array: Array, mask: Bool[Array, "..."] | None = None, axes: Any = None) -> Tally:
    """Counts over some axes (all by default), where the mask of the leading axes is true."""
    if mask is not None:
        array = jnp.where(mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim)), array, 0)
    finite = jnp.isfinite(array)
    largest = jnp.max(jnp.where(finite, jnp.abs(array), 0), axis=axes, initial=0)
    return jnp.sum(~finite, axis=axes), largest.astype(jnp.float32)


def _plain(tally: Tally) -> tuple[int, float]:
    bad, largest = jax.device_get(tally)
    return int(bad), float(largest)


def _check_leaves(tree: Any, kind: str, model: config.Model) -> list[ArrayCheck]:
    """The floating-point leaves of a tree; those stacked over layers layer by layer."""
    leaves = [
        (path, array)
        for path, array in jax.tree.leaves_with_path(tree)
        if jnp.issubdtype(array.dtype, jnp.floating)
    ]
    numbers = [_layers_of(path, model) for path, _ in leaves]

    @jax.jit
    def tally(arrays: list[Array]) -> list[Tally]:
        return [
            _tally(array, axes=None if layers is None else tuple(range(1, array.ndim)))
            for array, layers in zip(arrays, numbers, strict=True)
        ]

    tallies = jax.device_get(tally([array for _, array in leaves]))
    checked = []
    for (path, _), layers, (bad, largest) in zip(leaves, numbers, tallies, strict=True):
        name = f"{kind} {_name(path)}".strip()
        if layers is None:
            checked.append(ArrayCheck(name, int(bad), float(largest)))
            continue
        for layer, *values in zip(layers, bad, largest, strict=True):
            checked.append(ArrayCheck(f"layer {layer}: {name}", int(values[0]), float(values[1])))
    return checked


def _layers_of(path: Any, model: config.Model) -> range | None:
    """Numbers of the layers along the first axis of a leaf; None for what is not in a layer."""
    found = re.search(r"'(\w+)'\]\['layers'\]\[(\d+)\]", jax.tree_util.keystr(path))
    if not found:
        return None
    stack = next(stack for stack in stacks_of(model) if stack.name == found[1])
    return stack.layers_at(int(found[2]))


def _name(path: Any) -> str:
    """``.mu['groups']['layers'][0]['attention']['query_DHW']`` as ``mu attention query_DHW``."""
    parts = re.findall(r"[A-Za-z_][A-Za-z_0-9]*", jax.tree_util.keystr(path))
    return " ".join(part for part in parts if not _UNNAMED.fullmatch(part))


def _distance(name: str) -> float:
    """Distance of a parameter from the loss: the output first, the embedding last."""
    if name.startswith("layer "):
        return -int(name.split()[1].rstrip(":"))
    return math.inf if name.startswith("embedding") else -math.inf
