"""The real training step, compiled ahead of time for devices that need not be there."""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled

from dynmoe_jax import config
from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.mesh.make_mesh import batch_sharding, replicated, state_shardings
from dynmoe_jax.planning.hlo.module import Module
from dynmoe_jax.runs.compilation import options_of
from dynmoe_jax.training.objectives import batch_arrays
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import TrainState, init_state, make_train_step

_NEEDED = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT])")
_EXPONENT = {unit: 10 * (i + 1) for i, unit in enumerate("KMGT")}


class TooLarge(RuntimeError):
    """The compiler found no way to fit the step into a device's memory.

    Attributes:
      needed: bytes of temporaries, or of everything, that it says are needed; 0 if it does not.
    """

    def __init__(self, message: str):
        super().__init__(message.splitlines()[0])
        found = _NEEDED.search(message)
        self.needed = int(float(found[1]) * 2 ** _EXPONENT[found[2]]) if found else 0


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """Result of compiling a training step.

    Attributes:
      module: as it is scheduled.
      plan: bytes by kind, on one device.
      seconds: that compiling took.
    """

    module: Module
    plan: Any
    seconds: float


def state_shapes(cfg: config.Config, mesh: Mesh) -> TrainState:
    """Shapes of the whole state, each with where it lies on the mesh."""
    optimizer = make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, cfg.train.steps))
    with compile_for(Target.of(mesh.devices.flat[0])), jax.set_mesh(mesh):
        # The key inside: nothing can run on devices that are not there.
        shapes = jax.eval_shape(lambda: init_state(cfg, optimizer, jax.random.key(0)))
        return with_shardings(shapes, state_shardings(shapes, mesh))


def compile_step(cfg: config.Config, mesh: Mesh) -> CompiledStep:
    """Lowers and compiles the step that training runs.

    Args:
      cfg: all settings.
      mesh: of real or described devices.

    Raises:
      TooLarge: it does not fit into the devices' memory.
    """
    started = time.perf_counter()
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    state = state_shapes(cfg, mesh)
    target = Target.of(mesh.devices.flat[0])
    with compile_for(target), jax.set_mesh(mesh):
        rows = jax.ShapeDtypeStruct(
            (cfg.train.batch_size, cfg.data.seq_len), jnp.int32, sharding=batch_sharding(mesh)
        )
        batch = dict.fromkeys(batch_arrays(cfg), rows)
        # As in the trainer.
        step = jax.jit(
            make_train_step(cfg, optimizer, schedule),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), replicated(mesh)),
            compiler_options=options_of(target),
        )
        compiled = _compile(step.lower(state, batch))
    module = Module(compiled.as_text())
    return CompiledStep(module, compiled.memory_analysis(), time.perf_counter() - started)


def _compile(lowered: jax.stages.Lowered) -> Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # Not the fast memory of a kernel, whose tiles no setting changes.
        if "RESOURCE_EXHAUSTED" not in str(error) or "vmem" in str(error).lower():
            raise
        raise TooLarge(str(error)) from error


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes that know where they lie."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )
