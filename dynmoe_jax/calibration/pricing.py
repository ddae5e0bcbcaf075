"""Memory and FLOPs of a calibration, from the settings of the model alone.

Axis legend: D model width, E experts, F hidden width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

from dynmoe_jax import config
from dynmoe_jax.calibration.groups import Group, groups_of
from dynmoe_jax.calibration.statistics import STATISTICS
from dynmoe_jax.calibration.statistics.statistic import (
    Statistic,
    kind_of,
    rows_per_token,
    sizes_of,
)
from dynmoe_jax.config.layers import LayerSettings
from dynmoe_jax.model.flops import forward_flops
from dynmoe_jax.model.inputs import room_for_previous

SAMPLES = 2048
"""Tokens that are sampled unless something else is asked for."""


@dataclasses.dataclass(frozen=True)
class Price:
    """The price of gathering some statistics.

    Attributes:
      parameter_bytes: of the group of layers, or the table of tokens, that is largest.
      state_bytes: hidden states, and where gradients are needed those in front of every group.
      statistic_bytes: by statistic: its arrays of all layers, and the sums of one group.
      flops: of all tokens.
    """

    parameter_bytes: int
    state_bytes: int
    statistic_bytes: Mapping[str, int]
    flops: float

    @property
    def bytes(self) -> int:
        """All that is held at one time, on the host and the device together."""
        return self.parameter_bytes + self.state_bytes + sum(self.statistic_bytes.values())


def price(
    model: config.Model,
    wanted: Collection[str],
    tokens: int,
    *,
    length: int | None = None,
    samples: int = SAMPLES,
    layers: Collection[int] | None = None,
) -> Price:
    """Prices a calibration before anything is read.

    Args:
      model: the settings.
      wanted: names of statistics.
      tokens: positions of all batches, padding included.
      length: L, positions of a row; None: as many as the model has.
      samples: tokens that are sampled.
      layers: numbers of those that statistics are wanted of; None: all.

    Raises:
      ConfigError: there is no such statistic, or no layer that has it.
    """
    by_layer = wanted_by_layer(model, wanted, layers)
    needs = {need for names in by_layer.values() for n in names for need in STATISTICS[n].needs}
    states = 4 * tokens * (model.width + _previous(model))
    groups = list(groups_of(model))
    # In front of each group and behind the last one; the normed ones, and gradients by these.
    held = len(groups) + 5 if "gradients" in needs else 1
    table = 4 * model.vocab_size * model.width
    return Price(
        parameter_bytes=max(table, *(_group_bytes(group) for group in groups)),
        state_bytes=states * held,
        statistic_bytes=_statistic_bytes(model, by_layer, groups, samples),
        flops=tokens * _flops_per_token(model, by_layer, needs, length or model.max_seq_len),
    )


def wanted_by_layer(
    model: config.Model, wanted: Collection[str], layers: Collection[int] | None = None
) -> dict[int, tuple[str, ...]]:
    """Names of the statistics to take of each layer, in the order of the registry.

    Tokens by expert come with all others of a layer with experts: means are divided by them.

    Args:
      model: the settings.
      wanted: names of statistics.
      layers: numbers of those that they are wanted of; None: all.

    Raises:
      ConfigError: there is no such statistic, or no layer that has it.
    """
    if unknown := sorted(set(wanted) - set(STATISTICS)):
        raise config.ConfigError(
            f"{', '.join(unknown)} is no statistic; there are {', '.join(STATISTICS)}."
        )
    chosen = range(model.num_layers) if layers is None else sorted(layers)
    found = {number: _names_in(model.by_layer[number], wanted) for number in chosen}
    for name in wanted:
        if not any(name in names for names in found.values()):
            raise config.ConfigError(
                f"No layer that was asked for has {name}, which {_where(STATISTICS[name])}"
            )
    return found


def _names_in(layer: LayerSettings, wanted: Collection[str]) -> tuple[str, ...]:
    names = {name for name in wanted if STATISTICS[name]().exists(layer)}
    if names and layer.is_moe:
        names.add("routed_tokens")
    return tuple(name for name in STATISTICS if name in names)


def _where(statistic: type[Statistic]) -> str:
    """Where it exists, from the docstring of the method that decides: "holds …"."""
    text = statistic.exists.__doc__
    return text[:1].lower() + text[1:]


def _previous(model: config.Model) -> int:
    """Router logits that a token carries to the next layer."""
    moe = model.moe_settings
    return room_for_previous([(each.route, each.num_experts) for each in moe])


def _group_bytes(group: Group) -> int:
    leaves = (leaf for _, leaf in group.shapes.flat_state())
    return sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in leaves)


def _statistic_bytes(model, by_layer, groups: list[Group], samples: int) -> dict[str, int]:
    """Bytes by statistic."""

    def numbers(name: str, layers: range) -> int:
        own = [layer for layer in layers if name in by_layer.get(layer, ())]
        statistic = STATISTICS[name]()
        return sum(math.prod(statistic.shape(model.by_layer[n], samples)) for n in own)

    names = {name for of_layer in by_layer.values() for name in of_layer}
    found = {}
    for name in names:
        kept = 4 * numbers(name, range(model.num_layers))
        # Sums of one group: float64, and float32 of a batch that has just been computed.
        found[name] = kept + 12 * max(numbers(name, group.layers) for group in groups)
    return found


def _flops_per_token(model, by_layer, needs: Collection[str], length: int) -> float:
    rows = [rows_per_token(layer) for layer in model.by_layer if layer.is_moe]
    head = 2.0 * model.width * model.vocab_size
    forward = forward_flops(model, 1, length, rows) - head
    flops = forward
    if "gradients" in needs:
        # The layers once more, and the gradients by their inputs and weights; the logits twice, and
        # the gradient by what they are made of.
        flops += 3 * forward + 3 * head
    return flops + sum(_of_layer(model.by_layer[n], names) for n, names in by_layer.items())


def _of_layer(layer: LayerSettings, names: Collection[str]) -> float:
    """FLOPs of a token for the statistics of a layer."""
    statistics = [STATISTICS[name]() for name in names]
    flops = sum(statistic.flops(layer) for statistic in statistics)
    if layer.is_moe and any("gradients" in statistic.needs for statistic in statistics):
        # Kernels keep hidden units of experts to themselves: they are computed again.
        sizes = sizes_of(layer, 0)
        again = kind_of(layer).flops_per_row(sizes["D"], sizes["F"]) - 2.0 * sizes["D"] * sizes["F"]
        flops += rows_per_token(layer) * again
    return flops


def check_price(found: Price, bound_bytes: int, tokens: int) -> None:
    """Raises ConfigError where a calibration needs more memory than it may have."""
    if found.bytes <= bound_bytes:
        return
    largest = max(found.statistic_bytes, key=found.statistic_bytes.get)
    if found.statistic_bytes[largest] > found.state_bytes:
        remedy = f"leave out {largest}, which takes {_gigabytes(found.statistic_bytes[largest])}"
    else:
        remedy = f"take fewer tokens, whose states take {_gigabytes(found.state_bytes)}"
    raise config.ConfigError(
        f"A calibration on {tokens:,} tokens needs {_gigabytes(found.bytes)} of memory and may "
        f"have {_gigabytes(bound_bytes)}; {remedy}, or allow more."
    )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
