"""A run while a process works on it."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from dynmoe_jax import config
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.training.health.memory import Memory
from dynmoe_jax.training.interrupt import StopRequest
from dynmoe_jax.training.log.seconds import Seconds


@dataclasses.dataclass(frozen=True)
class Run:
    """Parts of a run that stay the same while a process works on it, rollbacks included.

    Attributes:
      cfg: all settings.
      workdir: the run's folder.
      mesh: the devices.
      memory: estimate of what the devices have to hold.
      checkpoints: those in ``workdir``, open for writing.
      stop: whether somebody asked the run to stop.
      seconds: where its time went.
    """

    cfg: config.Config
    workdir: Path
    mesh: Mesh
    memory: Memory
    checkpoints: Checkpoints
    stop: StopRequest
    seconds: Seconds
