"""Names of hardware: slices of TPUs, and boxes of GPUs."""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import math
import os
import re

import jax
from packaging.requirements import Requirement

from dynmoe_jax import config
from dynmoe_jax.hardware.chips import CHIPS, Chip

EXAMPLES = "v5p:4x4x4, v6e:8x8, h100:8 or h100:4x8"
_NAME = re.compile(r"^([a-z0-9]+):(\d+(?:x\d+)*)$")
_NO_TPU_HERE = {
    # There is no cloud to ask, and no chip that two processes could share.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Nor is anything wrong with that.
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some hardware.

    Attributes:
      name: as it was asked for.
      chip_name: a key of ``CHIPS``.
      sizes: chips along each direction of a slice; (nodes, GPUs of one) of GPUs.
      slices: of TPUs, joined by a data-centre network.
    """

    name: str
    chip_name: str
    sizes: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """Data sheet of each device."""
        return CHIPS[self.chip_name]

    @property
    def is_tpu(self) -> bool:
        """Whether the compiler can say what it makes of a step."""
        return "TPU" in self.chip.device_kind

    @property
    def chips(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes) * self.slices

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self.chip.devices_per_chip


def parse_topology(name: str, slices: int = 1) -> Topology:
    """The topology of a name such as ``v5p:4x4x4``, ``h100:8`` or ``h100:4x8``.

    Args:
      name: chip, and how many along each direction; of GPUs their number, or nodes x GPUs of one.
      slices: how many of them; GPUs need no such number, whose nodes are in the name.

    Raises:
      ConfigError: nothing is known by that name.
    """
    found = _NAME.match(name)
    if not found:
        raise config.ConfigError(
            f"--topology={name!r} is not the name of a topology; write a chip and its numbers, "
            f"such as {EXAMPLES}."
        )
    chip, sizes = found[1], tuple(int(n) for n in found[2].split("x"))
    if chip not in CHIPS:
        near = difflib.get_close_matches(chip, CHIPS, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise config.ConfigError(
            f"--topology={name!r}: the chip {chip!r} is not known; known are "
            f"{', '.join(CHIPS)}{hint}"
        )
    topology = Topology(name, chip, sizes)
    if topology.is_tpu:
        topology = dataclasses.replace(topology, slices=slices)
    directions = _directions(topology.chip)
    if len(sizes) not in directions or 0 in sizes:
        wanted = " or ".join(str(n) for n in directions)
        raise config.ConfigError(
            f"--topology={name!r} must give {wanted} numbers of at least 1 after {chip}, such as "
            f"{_example(topology.chip, chip)}."
        )
    if slices > 1 and topology.is_tpu and not topology.chip.network_bytes_per_s:
        raise config.ConfigError(
            f"config.mesh.slice={slices}: the data-centre network of {chip} is not known; plan one "
            "slice, or another chip."
        )
    return topology


def _directions(chip: Chip) -> tuple[int, ...]:
    if "TPU" not in chip.device_kind:
        return (1, 2)
    return (3,) if chip.links == 6 else (2,)


def _example(chip: Chip, name: str) -> str:
    return {(1, 2): f"{name}:8 or {name}:4x8", (2,): f"{name}:8x8", (3,): f"{name}:4x4x4"}[
        _directions(chip)
    ]


def describe_devices(topology: Topology) -> list[jax.Device]:
    """The devices of TPU slices that need not be there.

    Raises:
      ConfigError: there is no such slice, or the compiler for TPUs is not installed, or not the
        one that JAX asks for.
    """
    if reason := why_not():
        raise config.ConfigError(f"--topology: {reason}.")
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    arguments = {"chips_per_host_bounds": [*(min(2, n) for n in topology.sizes[:2]), 1]}
    if topology.slices > 1:
        arguments["num_slices"] = topology.slices
    if topology.chip_name == "v4":
        # One device per chip, as Cloud's machines have it.
        arguments["chip_config_name"] = "megacore"
    name = f"{topology.chip_name}:{'x'.join(map(str, topology.sizes))}"
    try:
        with _quiet():
            described = topologies.get_topology_desc(name, "tpu", **arguments)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise config.ConfigError(
            f"--topology={topology.name!r} is no slice that the TPU compiler knows ({reason}); "
            f"use one such as {_example(topology.chip, topology.chip_name)}."
        ) from error
    return list(described.devices)


def why_not() -> str:
    """Why nothing can be compiled for a TPU here; empty if it can."""
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "to plan for a TPU its compiler is needed; pip install -e '.[tpu-aot]'"
    # Another one writes HLO that this jaxlib cannot read.
    for wanted in map(Requirement, importlib.metadata.requires("jax") or ()):
        if wanted.name == "libtpu" and not wanted.specifier.contains(version, prereleases=True):
            return (
                f"libtpu {version} is not the one that JAX {jax.__version__} asks for; "
                f"pip install 'libtpu{wanted.specifier}'"
            )
    return ""


@contextlib.contextmanager
def _quiet():
    """Without what libtpu writes to standard error about the TPU that is not there."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
