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
      cfg: all settings, with the model of the steps that are worked on; that does not grow.
      workdir: the run's folder.
      mesh: the devices.
      memory: estimate of what the devices have to hold.
      checkpoints: those in ``workdir``, open for writing.
      stop: whether somebody asked the run to stop.
      seconds: where its time went.
      asked: all settings as the run began, which its checkpoints keep: these say how it grows.
    """

    cfg: config.Config
    workdir: Path
    mesh: Mesh
    memory: Memory
    checkpoints: Checkpoints
    stop: StopRequest
    seconds: Seconds
    asked: config.Config

    def at(self, done: int) -> "Run":
        """The run with the model of the step after ``done``."""
        cfg = config.settings_at(self.asked, done + 1)
        if cfg.model == self.cfg.model:
            return dataclasses.replace(self, cfg=cfg)
        return dataclasses.replace(self, cfg=cfg, memory=Memory(cfg, self.mesh.shape))

    def grows_after(self, done: int) -> int:
        """The step after which the model grows next; the last one if it does not."""
        later = (step for step in config.growth_steps(self.asked.train) if step > done)
        return next(later, self.asked.train.steps)
