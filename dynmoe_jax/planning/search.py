"""Search among the meshes of a topology for the best one."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import check_divides
from dynmoe_jax.planning.plan import Plan
from dynmoe_jax.planning.tpu.topology import Topology


@dataclasses.dataclass(frozen=True)
class Search:
    """Result of a search.

    Attributes:
      topology: as it was asked for.
      ranked: plans that fit, by step time.
      too_large: plans that do not fit.
      refused: reason by mesh, of meshes that were not tried.
    """

    topology: str
    ranked: tuple[Plan, ...]
    too_large: tuple[Plan, ...]
    refused: dict[str, str]

    @classmethod
    def of(cls, topology: str, plans: Sequence[Plan], refused: dict[str, str]) -> "Search":
        """Ranks plans."""
        fitting = [plan for plan in plans if plan.memory.fits and plan.time]
        return cls(
            topology,
            tuple(sorted(fitting, key=lambda plan: plan.time.step)),
            tuple(plan for plan in plans if plan not in fitting),
            refused,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "topology": self.topology,
            "ranked": [plan.to_dict() for plan in self.ranked],
            "too_large": [plan.to_dict() for plan in self.too_large],
            "refused": self.refused,
        }


def candidate_meshes(
    cfg: config.Config, topology: Topology
) -> tuple[list[dict[str, int]], dict[str, str]]:
    """(meshes to try, reason by mesh that is not tried), the fewest cuts of the model first.

    All ways to share the devices of a slice between ``data``, ``expert`` and ``model``.
    """
    candidates, refused = [], {}
    for sizes in _meshes(topology):
        try:
            check_divides(cfg.model, sizes)
            _check_useful(cfg, sizes)
        except config.ConfigError as error:
            refused[mesh_name(sizes)] = str(error)
        else:
            candidates.append(sizes)
    return candidates, refused


def _meshes(topology: Topology) -> Iterator[dict[str, int]]:
    devices = topology.devices // topology.slices
    for model in _divisors(devices):
        for expert in _divisors(devices // model):
            data = devices // model // expert
            yield {"slice": topology.slices, "data": data, "expert": expert, "model": model}


def _check_useful(cfg: config.Config, sizes: dict[str, int]) -> None:
    """Raises ConfigError for a mesh that has devices without work of their own."""
    parts = sizes["slice"] * sizes["data"] * sizes["expert"]
    if cfg.train.batch_size % parts:
        raise config.ConfigError(
            f"config.train.batch_size={cfg.train.batch_size} must be a multiple of the {parts} "
            "devices that share the batch."
        )
    if sizes["expert"] > 1 and not cfg.model.num_moe_layers:
        raise config.ConfigError("config.mesh.expert: a dense model has no experts to share.")


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def mesh_name(sizes: dict[str, int]) -> str:
    """``data 16 x expert 4``: the axes that are cut."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1 device"
