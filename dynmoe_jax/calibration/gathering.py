"""Gathering statistics: one pass over the text for all that is asked for and not there yet.

Axis legend: B batch, L positions, T = B L tokens of a batch, S sampled tokens.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from dynmoe_jax.calibration.backward import sweep_back
from dynmoe_jax.calibration.measure import Measure
from dynmoe_jax.calibration.pricing import check_price, price, wanted_by_layer
from dynmoe_jax.calibration.seen import SAMPLE
from dynmoe_jax.calibration.statistics import STATISTICS
from dynmoe_jax.calibration.store import Statistics
from dynmoe_jax.calibration.stream import Batch, Stream, streamed
from dynmoe_jax.runs.load import OpenedRun


def gather(
    run: OpenedRun,
    batches: Sequence[Batch],
    wanted: Collection[str],
    bound_bytes: int,
    known: Statistics,
    layers: Collection[int] | None = None,
) -> Statistics:
    """Adds to the statistics that are known those that are not.

    Args:
      run: the model, as it lies on disk.
      batches: the text; ``targets`` are read where gradients are needed.
      wanted: names of statistics, see :data:`STATISTICS`.
      bound_bytes: the most memory that may be held.
      known: of the same model and text; empty at first.
      layers: numbers of those that statistics are wanted of; None: all.

    Returns:
      those known and those wanted; without a pass over the text where all were there.

    Raises:
      ConfigError: a statistic does not exist, or more memory would be needed.
    """
    model = run.config.model
    missing = known.missing(wanted_by_layer(model, wanted, layers))
    names = {name for of_layer in missing.values() for name in of_layer}
    if not names:
        return known
    tokens, length = sum(b["tokens"].size for b in batches), batches[0]["tokens"].shape[1]
    numbers = [layer for layer, of_layer in missing.items() if of_layer]
    asked = {"length": length, "samples": known.samples, "layers": numbers}
    check_price(price(model, names, tokens, **asked), bound_bytes, tokens)
    batches, counts = _with_samples(batches, known.samples, known.seed)
    totals = _Totals(counts, [int((batch["segment_ids"] > 0).sum()) for batch in batches])
    _pass_over(run, batches, missing, totals)
    arrays = {**known.arrays, **totals.arrays}
    return dataclasses.replace(known, tokens=sum(totals.tokens), arrays=arrays)


def _pass_over(run, batches, missing: Mapping[int, Collection[str]], totals: "_Totals") -> None:
    """One sweep up, and one down where gradients are needed."""

    def measure(layer: int, backward: bool) -> Measure:
        names = missing.get(layer, ())
        own = {n for n in names if ("gradients" in STATISTICS[n].needs) == backward}
        if own and run.config.model.by_layer[layer].is_moe:
            own.add("routed_tokens")  # means are divided by these
        return Measure(tuple(sorted(own)))

    forward = {layer: measure(layer, False) for layer in range(run.config.model.num_layers)}
    backward = {layer: measure(layer, True) for layer in forward}
    kept: list[list[Stream]] = []
    keep = kept.append if any(each.names for each in backward.values()) else None
    hidden = streamed(run, batches, forward.__getitem__, totals.add, keep)
    if keep:
        sweep_back(run, batches, hidden, kept, backward.__getitem__, totals.add)


class _Totals:
    """Sums over batches, float64 until a layer has seen all of them.

    Args:
      samples: sampled tokens of each batch.
      tokens: valid tokens of each batch.
    """

    def __init__(self, samples: list[int], tokens: list[int]):
        self.samples, self.tokens = samples, tokens
        self.arrays: dict[tuple[str, int], np.ndarray] = {}
        self._sums: dict[tuple[str, int], np.ndarray] = {}
        self._parts: dict[tuple[str, int], list[np.ndarray]] = {}

    def add(self, layer: int, batch: int, found: Mapping[str, np.ndarray]) -> None:
        """Adds what a batch gave; batches come in order, layer by layer of a group."""
        for name, array in found.items():
            at = (name, layer)
            if STATISTICS[name].form == "sample":
                self._parts.setdefault(at, []).append(array[: self.samples[batch]])
            elif at in self._sums:
                self._sums[at] += array
            else:
                self._sums[at] = np.array(array, np.float64)
        if batch + 1 == len(self.tokens):
            self._finish(layer, found)

    def _finish(self, layer: int, names: Collection[str]) -> None:
        rows = self._sums.get(("routed_tokens", layer), sum(self.tokens))
        for name in names:
            at, form = (name, layer), STATISTICS[name].form
            whole = np.concatenate(self._parts.pop(at)) if form == "sample" else self._sums.pop(at)
            if form == "mean":
                # Of an expert without rows: 0.
                axes = (1,) * (whole.ndim - np.ndim(rows))
                whole = whole / np.maximum(np.reshape(rows, np.shape(rows) + axes), 1)
            self.arrays[at] = whole.astype(np.int64 if name == "routed_tokens" else np.float32)


def _with_samples(
    batches: Sequence[Batch], samples: int, seed: int
) -> tuple[list[Batch], list[int]]:
    """(batches with the places of their sampled tokens, how many those are).

    The same tokens for the same text and seed, whatever is gathered of them.
    """
    valid = [np.flatnonzero(batch["segment_ids"].reshape(-1) > 0) for batch in batches]
    ends = np.cumsum([len(places) for places in valid])
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(ends[-1], min(samples, ends[-1]), replace=False))
    parts = np.split(chosen, np.searchsorted(chosen, ends)[:-1])
    most, given = max(map(len, parts)), []
    for batch, places, part, end in zip(batches, valid, parts, ends, strict=True):
        own = places[part - (end - len(places))]
        filled = np.zeros(most, np.int32)
        filled[: len(own)] = own
        given.append({**batch, SAMPLE: filled})
    return given, [len(part) for part in parts]
