"""Traffic between devices: how many bytes, along which mesh axis, and how long it takes."""

import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from dynmoe_jax.hardware.chips import Chip
from dynmoe_jax.planning.hlo.instruction import Instruction

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
HOP_SECONDS = 1e-6
"""Seconds that a message takes from one chip to the next, whatever its size: about a microsecond
("How to Scale Your Model", the chapter on TPUs)."""

_EXPLICIT = re.compile(r"replica_groups=\{(\{[\d,{}]*\})?\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*(?:,?\s*device_ids=\S+\s*)?\{([^}]*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")


def kind_of(instruction: Instruction) -> str | None:
    """One of ``KINDS``, also for the start of an asynchronous one; None for anything else."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def groups_of(instruction: Instruction, devices: int) -> Int[np.ndarray, "groups members"]:
    """The devices that exchange with each other, by their number in the mesh.

    Raises:
      ValueError: the groups are written in a way that is not known here.
    """
    text = instruction.text
    if found := _PAIRS.search(text):
        return np.array(_numbers(found[1]))
    if found := _IOTA.search(text):
        shape, order = _dimensions(found[1]), _dimensions(found[2])
        numbers = np.arange(math.prod(order)).reshape(order)
        return (numbers.transpose(_dimensions(found[3])) if found[3] else numbers).reshape(shape)
    if found := _AXES.search(text):
        return _groups_by_axes(found[1], found[2])
    if found := _EXPLICIT.search(text):
        return np.array(_numbers(found[1])) if found[1] else np.arange(devices)[None]
    raise ValueError(f"The groups of the collective {instruction.name} cannot be read.")


def _groups_by_axes(mesh: str, chosen: str) -> np.ndarray:
    """Groups of devices that differ along the chosen axes alone, from ``'axis_0'=4,'axis_1'=2`` and
    ``'axis_1'``."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    inside = [i for i, name in enumerate(sizes) if f"'{name}'" in chosen]
    outside = [i for i in range(len(sizes)) if i not in inside]
    numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    members = math.prod(numbers.shape[i] for i in inside)
    return numbers.transpose(*outside, *inside).reshape(-1, members)


def _numbers(text: str) -> list[list[int]]:
    return [list(_dimensions(group)) for group in re.findall(r"\{([\d,]+)\}", text)]


def _dimensions(text: str) -> tuple[int, ...]:
    return tuple(int(d) for d in text.split(","))


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One run of a collective, as one device sees it.

    Attributes:
      kind: one of ``KINDS``.
      axes: mesh axes that it runs along, joined by ``+``; ``"?"`` if it runs along none.
      bytes: that the device sends.
      seconds: until the slowest link has carried its share.
    """

    kind: str
    axes: str
    bytes: float
    seconds: float


class Network:
    """The links between the devices of a mesh.

    A TPU's chips form a torus.  A collective over a group of devices uses, of every direction of
    the torus in which the group extends, the links that leave a chip: two where the group closes
    the ring, otherwise one.  What goes to other slices shares the data-centre network.

    Args:
      mesh: of described or real devices.
      chip: what they are.
    """

    def __init__(self, mesh: Mesh, chip: Chip):
        self._mesh, self._chip = mesh, chip
        devices = list(mesh.devices.flat)
        self._place = np.array([tuple(getattr(d, "coords", None) or (0, 0, 0)) for d in devices])
        self._slice = np.array([getattr(d, "slice_index", 0) or 0 for d in devices])
        self._extent = self._place.max(axis=0) - self._place.min(axis=0) + 1

    def transfer(self, instruction: Instruction) -> Transfer:
        """Transfer of a collective: what it sends, and how long it takes at the links' full
        rate."""
        kind = kind_of(instruction)
        groups = groups_of(instruction, self._mesh.size)
        if kind == "collective-permute":
            size = instruction.sizes[0]
            moved = groups[groups[:, 0] != groups[:, 1]]
            axes = max(map(self.axes, moved), key=len) if len(moved) else "?"
            return Transfer(kind, axes, size, self._hand_on(size, moved))
        group, members = groups[0], groups.shape[1]
        size = _whole_bytes(kind, instruction, members)
        share = (members - 1) / members
        passes = 2 if kind == "all-reduce" else 1
        sent = passes * share * size
        if kind.endswith("all-to-all"):
            return Transfer(kind, self.axes(group), sent, self._exchange(size, group))
        return Transfer(kind, self.axes(group), sent, self._carry(passes * size, group, share))

    def axes(self, group: Int[np.ndarray, "members"]) -> str:
        """The mesh axes along which the devices of a group differ."""
        at = np.unravel_index(group, self._mesh.devices.shape)
        names = [n for n, c in zip(self._mesh.axis_names, at, strict=True) if len(set(c)) > 1]
        return "+".join(names) or "?"

    def _carry(self, size: float, group, share: float) -> float:
        """Every device ends up with ``size`` bytes, of which it lacks ``share``."""
        slices = len(set(self._slice[group]))
        seconds = 0.0
        if slices > 1:
            # Each device of a slice fetches its part, which then goes round within the slice.
            each = self._chip.network_bytes_per_s * len(group) / slices
            seconds = (slices - 1) / slices * size / each
            group = group[self._slice[group] == self._slice[group[0]]]
            share = (len(group) - 1) / len(group)
        links, hops = self._links(group)
        if links:
            seconds += share * size / (links * self._chip.link_bytes_per_s)
        return seconds + HOP_SECONDS * max(hops, 1)

    def _hand_on(self, size: float, pairs: Int[np.ndarray, "pairs 2"]) -> float:
        """The first device of each pair sends ``size`` bytes to the second."""
        if not len(pairs):
            return 0.0
        if (self._slice[pairs[:, 0]] != self._slice[pairs[:, 1]]).any():
            return size / self._chip.network_bytes_per_s
        everybody = np.unique(pairs)
        hops_of_pairs = np.zeros(len(pairs), int)
        busiest = 0.0
        for axis in range(self._place.shape[1]):
            hops = np.abs(np.diff(self._place[pairs, axis], axis=1)[:, 0])
            length, closed = self._direction(everybody, axis)
            if closed:
                hops = np.minimum(hops, length - hops)
            # All may go the same way round: one link of each chip in this direction.
            busiest = max(busiest, hops.mean())
            hops_of_pairs += hops
        # Devices of one chip, or devices that do not say where they are.
        seconds = (busiest or 1.0) * size / self._chip.link_bytes_per_s
        return seconds + HOP_SECONDS * max(hops_of_pairs.max(), 1)

    def _exchange(self, size: float, group) -> float:
        """Every device sends an equal part of ``size`` bytes to every other."""
        slices = len(set(self._slice[group]))
        if slices > 1:
            return (slices - 1) / slices * size / self._chip.network_bytes_per_s
        seconds, hops = 0.0, 0
        for length, closed in self._directions(group):
            # A byte makes length/4 hops on a ring, on two links; half of them cross the middle of
            # a line, on one link.
            load = length / 8 if closed else length / 4
            seconds = max(seconds, load * size / self._chip.link_bytes_per_s)
            hops += length // 2
        return seconds + HOP_SECONDS * max(hops, 1)

    def _directions(self, group) -> list[tuple[int, bool]]:
        """(chips, whether they close a ring) of every direction that a group extends in."""
        found = (self._direction(group, axis) for axis in range(self._place.shape[1]))
        return [(length, closed) for length, closed in found if length > 1]

    def _direction(self, group, axis: int) -> tuple[int, bool]:
        """(chips of a group in one direction of the torus, whether they close a ring)."""
        length = len(set(self._place[group, axis]))
        whole = length == self._extent[axis]
        # Six links: rings of 4, 8, ... chips; four links: of 16 (Google Cloud's pages).
        ring = length % 4 == 0 if self._chip.links == 6 else length == 16
        return length, bool(whole and ring)

    def _links(self, group) -> tuple[int, int]:
        """(links that leave a chip within the group, hops to the farthest chip)."""
        directions = self._directions(group)
        links = sum(2 if closed else 1 for _, closed in directions)
        hops = sum(length // 2 if closed else length - 1 for length, closed in directions)
        # Devices of one chip, or devices that do not say where they are.
        return links or (1 if len(group) > 1 else 0), hops


def _whole_bytes(kind: str, instruction: Instruction, members: int) -> float:
    """Bytes of the array that is gathered, scattered, summed or exchanged, before it is split."""
    sizes = instruction.sizes
    if instruction.opcode.endswith("-start"):
        # (operands, results, and the semaphores of the transfer).
        sizes = [size for size in sizes if size > 4]
        if kind == "all-reduce":
            return float(sum(sizes))
        pairs = len(sizes) // 2
        sizes = sizes[pairs : 2 * pairs] if pairs else sizes
    return float(sum(sizes)) * (members if kind == "reduce-scatter" else 1)
