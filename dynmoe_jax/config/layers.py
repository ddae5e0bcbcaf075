"""Settings of single layers: ``config.model.layers`` says what some layers do otherwise.

Parts are separated by semicolons; each names layers, counted from 0, and what they have of their
own::

    0-3:moe.num_experts=12;4,6:num_heads=8;5:feed_forward=dense,hidden_width=512

Any setting declared with ``per_layer`` may be named; ``feed_forward=dense`` or ``=moe`` decides
whether a layer has experts, whatever ``config.model.moe.every_n_layers`` says.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dynmoe_jax.fields import ConfigError, check_value, from_text, nearest, walk
from dynmoe_jax.registry import idle_kinds

FEED_FORWARD = "feed_forward"
"""Name that stands for having experts or not, which has no setting of its own."""

_KINDS = {"dense": False, "moe": True}
_EXAMPLE = "'0-3:moe.num_experts=12;5:moe.hidden_width=512'"
_OF_DENSE = ("hidden_width", "activation")
"""Settings that only a dense layer reads; those of ``moe`` only a layer with experts."""


@dataclasses.dataclass(frozen=True)
class LayerSettings:
    """Settings of one decoder layer.

    Attributes:
      model: the model's, with what this layer has of its own.
      is_moe: whether the layer has experts.
    """

    model: Any
    is_moe: bool


@dataclasses.dataclass(frozen=True)
class _Part:
    """One assignment: ``name=value`` in some layers."""

    layers: tuple[int, ...]
    name: str
    value: Any


@functools.lru_cache(maxsize=256)
def layer_models(model: Any) -> tuple[LayerSettings, ...]:
    """The settings of every layer, in order; equal layers have equal settings.

    A layer takes over what it reads: a dense one nothing of ``moe``, one with experts not the width
    of the dense ones.

    Args:
      model: a :class:`dynmoe_jax.config.Model`.

    Raises:
      ConfigError: ``config.model.layers`` is not what it should be.
    """
    pattern = set(_pattern(model))
    if not model.layers:
        return tuple(LayerSettings(model, i in pattern) for i in range(model.num_layers))
    parts = list(_parts(model))
    values = _values_by_layer(model, parts)
    is_moe = [
        _KINDS[own[FEED_FORWARD]] if FEED_FORWARD in own else i in pattern
        for i, own in enumerate(values)
    ]
    _check_effect(model, parts, is_moe)
    return tuple(map(functools.partial(_layer, model), values, is_moe))


def own_values(model: Any) -> list[dict[str, Any]]:
    """The values that ``config.model.layers`` gives each layer, by name."""
    return _values_by_layer(model, list(_parts(model)))


def written_layers(values: Sequence[Mapping[str, Any]]) -> str:
    """The text of ``config.model.layers`` that gives each layer these values."""
    layers: dict[tuple[str, Any], list[int]] = {}
    for layer, own in enumerate(values):
        for assignment in own.items():
            layers.setdefault(assignment, []).append(layer)
    together: dict[str, list[str]] = {}
    for (name, value), numbers in layers.items():
        together.setdefault(_ranges(numbers), []).append(f"{name}={value}")
    return ";".join(f"{where}:{','.join(what)}" for where, what in together.items())


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as they are written: ``0-3,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _pattern(model: Any) -> range:
    """The layers that have experts unless they say otherwise."""
    first, every = model.moe.dense_first_layers + model.moe.layer_offset, model.moe.every_n_layers
    return range(first, model.num_layers, every) if every else range(0)


def _layer(model: Any, own: dict[str, Any], is_moe: bool) -> LayerSettings:
    settings = dataclasses.replace(model, layers="")
    for name, value in own.items():
        if name != FEED_FORWARD and _is_read(name, is_moe):
            settings = _replaced(settings, name.split("."), value)
    _check_kinds(model, own, settings, "")
    if is_moe:
        _check_kinds(model, own, settings.moe, "moe.")
    return LayerSettings(settings, is_moe)


def _check_kinds(model: Any, own: dict[str, Any], group: Any, prefix: str) -> None:
    """Raises ConfigError for a setting of a kind that the layer does not choose."""
    for choice, kind, _ in idle_kinds(group):
        for name in own:
            if name.startswith(f"{prefix}{kind}."):
                chosen = f"{prefix}{choice}"
                raise _wrong(
                    model,
                    f"sets {name} in a layer whose {chosen}={getattr(group, choice)!r} does not "
                    f"read it; add {chosen}={kind} there, or leave it out",
                )


def _is_read(name: str, is_moe: bool) -> bool:
    """Whether a layer with experts, or without, reads a setting."""
    return name not in _OF_DENSE if is_moe else not name.startswith("moe.")


def _replaced(group: Any, path: Sequence[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replaced(getattr(group, path[0]), path[1:], value)
    return dataclasses.replace(group, **{path[0]: value})


def _wrong(model: Any, why: str) -> ConfigError:
    return ConfigError(f"config.model.layers={model.layers!r} {why}.")


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────


def _parts(model: Any) -> Iterator[_Part]:
    """Yields the assignments of the setting, in their order."""
    declared = {path: field for path, field, _ in walk(model)}
    for part in filter(None, (part.strip() for part in model.layers.split(";"))):
        where, colon, what = part.partition(":")
        layers = _numbers(model, where) if colon else ()
        for assignment in what.split(","):
            name, equals, text = (piece.strip() for piece in assignment.partition("="))
            if not (colon and name and equals and text):
                raise _wrong(
                    model,
                    f"has the part {part!r}, which is not written LAYERS:NAME=VALUE; write it as "
                    f"in {_EXAMPLE}",
                )
            yield _Part(layers, name, _value(model, declared, name, text))


def _numbers(model: Any, text: str) -> tuple[int, ...]:
    """The layers that ``0-3,5`` names."""
    found = []
    for piece in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not first <= last < model.num_layers:
            raise _wrong(
                model,
                f"names the layers {text.strip()!r}; name some from 0 to {model.num_layers - 1}, "
                f"rising (config.model.num_layers={model.num_layers})",
            )
        found += range(first, last + 1)
    return tuple(found)


def _value(model: Any, declared: dict[str, dataclasses.Field], name: str, text: str) -> Any:
    """The checked value of a setting."""
    own = [path for path, field in declared.items() if field.metadata["per_layer"]]
    if name == FEED_FORWARD:
        if text not in _KINDS:
            raise _wrong(model, f"says {name}={text}; write {' or '.join(_KINDS)}")
        return text
    if name in declared and name not in own:
        raise _wrong(
            model,
            f"names {name}, which all layers share; set config.model.{name}, or name one of "
            f"{', '.join([*own, FEED_FORWARD])}",
        )
    if name not in own:
        near = nearest(name, [*own, FEED_FORWARD])
        raise _wrong(model, f"names {name!r}, which does not exist; write {near} if you mean that")
    field = declared[name]
    value = from_text(field, text)
    check_value(name, field, value, prefix=f"In config.model.layers={model.layers!r}, ")
    return value


# ── Checks ───────────────────────────────────────────────────────────────────────────────────────


def _values_by_layer(model: Any, parts: Sequence[_Part]) -> list[dict[str, Any]]:
    """The values that each layer has of its own, by name."""
    found: list[dict[str, Any]] = [{} for _ in range(model.num_layers)]
    for part in parts:
        for i in part.layers:
            before = found[i].setdefault(part.name, part.value)
            if before != part.value:
                raise _wrong(
                    model,
                    f"gives layer {i} both {part.name}={before} and {part.name}={part.value}; "
                    "leave one of them out",
                )
    return found


def _check_effect(model: Any, parts: Sequence[_Part], is_moe: Sequence[bool]) -> None:
    """Raises ConfigError for an assignment that none of its layers reads."""
    for part in parts:
        if part.name == FEED_FORWARD or any(_is_read(part.name, is_moe[i]) for i in part.layers):
            continue
        kind = "have experts" if is_moe[part.layers[0]] else "are dense"
        other = "dense" if is_moe[part.layers[0]] else "moe"
        numbers = ", ".join(map(str, part.layers))
        raise _wrong(
            model,
            f"sets {part.name}={part.value} in layers that {kind} ({numbers}) and do not read it; "
            f"leave it out, or add {FEED_FORWARD}={other}",
        )
