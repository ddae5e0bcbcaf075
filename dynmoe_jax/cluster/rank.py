"""Position of a process among those of its run, as its flags say, or flags and Open MPI.

Without JAX, which is slow to load.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dynmoe_jax.fields import ConfigError

EXIT_PEER_LOST = 5
"""Exit code of a process that was well itself, when another one has died; the same command goes
on."""

_COUNT = "OMPI_COMM_WORLD_SIZE"
_BY_OPEN_MPI = {
    "num_processes": _COUNT,
    "process_id": "OMPI_COMM_WORLD_RANK",
    "local_id": "OMPI_COMM_WORLD_LOCAL_RANK",
}
_ADDRESS = "OMPI_MCA_orte_hnp_uri"
"""Environment variable with mpirun's address, by which JAX has process 0 be found.  Open MPI 5
tells it no more, and JAX takes each of its processes for one by itself."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """This process among the others; without the first three, JAX looks for a cluster.

    Attributes:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are; 1 alone means a process by itself, whatever is around it.
      process_id: the number of this one, from 0.
      connect_timeout: seconds that processes wait for each other at the start.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead.
      local_id: the number of this one on its machine, whose GPU of that number it takes; None means
        all devices, or what JAX finds.

    Raises:
      ConfigError: they contradict each other, or one is missing.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    connect_timeout: int = 300
    heartbeat_timeout: int = 100
    local_id: int | None = None

    def __post_init__(self):
        for name in ("connect_timeout", "heartbeat_timeout"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}={getattr(self, name)} must be at least 1 second.")
        explicit = {
            "coordinator": self.coordinator,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
        }
        missing = [f"--{name}" for name, value in explicit.items() if value is None]
        if self.is_alone or len(missing) == 3:
            return
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} is missing; give --coordinator=HOST:PORT, "
                "--num_processes=N and --process_id=0..N-1 together, or none of them."
            )
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(
                f"--coordinator={self.coordinator} must be HOST:PORT, with the host of process 0 "
                "and a free port there, e.g. 10.0.0.1:1234."
            )
        if self.num_processes < 1:
            raise ConfigError(f"--num_processes={self.num_processes} must be at least 1.")
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"--process_id={self.process_id} must be one of 0..{self.num_processes - 1}, the "
                f"--num_processes={self.num_processes} of this run."
            )

    @property
    def is_alone(self) -> bool:
        """Whether a process by itself was asked for."""
        return self.num_processes == 1 and self.coordinator is None and self.process_id is None


def rank_from(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Rank:
    """The rank that flags name; to a process that Open MPI has started, --coordinator is enough.

    Args:
      flags: those that were given, by the names of :class:`Rank`.
      environment: of this process.

    Raises:
      ConfigError: flags contradict each other, or one is missing.
    """
    count = int(environment.get(_COUNT, 1))
    named = flags.keys() & {"coordinator", "num_processes", "process_id"}
    if count > 1 and not named and _ADDRESS not in environment:
        raise ConfigError(
            f"Open MPI has started {_COUNT}={count} processes, but does not say where they meet; "
            "give all of them --coordinator=HOST:PORT, with the host of process 0 and a free port "
            "there, or --num_processes=1 if each is to train by itself."
        )
    if count > 1 and named == {"coordinator"}:
        told = {name: int(environment[variable]) for name, variable in _BY_OPEN_MPI.items()}
        return Rank(**flags, **told)
    return Rank(**flags)
