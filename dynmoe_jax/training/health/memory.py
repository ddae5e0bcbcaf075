"""Whether a run fits into memory, asked before it starts; and what to turn if it does not."""

import contextlib
import dataclasses
import functools
import math
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import jax
from jax.stages import Compiled

from dynmoe_jax import config
from dynmoe_jax.command_line import EXIT_OUT_OF_MEMORY
from dynmoe_jax.mesh.axes import batch_devices
from dynmoe_jax.mesh.make_mesh import bytes_per_device
from dynmoe_jax.model.parameters import count_parameters
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_ROOM = 0.95
"""Share of the memory that the advice aims at: the figures are estimates."""

_SURPRISE = 0.7
"""Share of the step that the advice aims at, where memory ran out although the step should fit."""


class OutOfMemory(RuntimeError):
    """The run does not fit; the message is one sentence for the user."""

    exit_code = EXIT_OUT_OF_MEMORY


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that training takes on one device.

    Attributes:
      state: parameters and optimizer.
      gradients: of all parameters.
      activations: everything else: what backward needs, logits, work space.
      snapshot: the copy of the state that checkpoints are written from, on a CPU.
    """

    state: int
    gradients: int
    activations: int = 0
    snapshot: int = 0

    @property
    def of_model(self) -> int:
        """Bytes that the model takes, however small the batch is."""
        return self.state + self.gradients + self.snapshot

    @property
    def total(self) -> int:
        """All of it."""
        return self.of_model + self.activations


def device_limit() -> int | None:
    """Bytes that one device has; None if it does not say.

    CPU devices share the memory of their host, or of the container that they run in.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limits.append(int(_CGROUP_LIMIT.read_text()))
    return min(limits) // jax.local_device_count()


class Memory:
    """Checks one run, and explains it when memory runs out all the same.

    Args:
      cfg: all settings.
      sizes: devices along each mesh axis.
    """

    def __init__(self, cfg: config.Config, sizes: Mapping[str, int]):
        self._cfg, self._sizes = cfg, dict(sizes)
        self._devices = batch_devices(self._sizes)
        self._limit = device_limit()
        self._need: Need | None = None

    def check_state(self) -> None:
        """Refuses a run that cannot fit, before anything is compiled or allocated.

        Of the activations only what is there at the least is counted: the batch, and one residual
        stream.

        Raises:
          OutOfMemory: state and gradients need more than there is.
        """
        sizes = tuple(self._sizes.items())
        state, gradients = _state_bytes(self._cfg, sizes)
        tokens = self._cfg.train.batch_size * self._cfg.data.seq_len // self._devices
        stream = 4 * self._cfg.model.width * tokens // self._cfg.train.microbatches
        snapshot = state if jax.default_backend() == "cpu" else 0
        self._check(Need(state, gradients, 16 * tokens + stream, snapshot))

    def check_step(self, step: Compiled) -> None:
        """Refuses a step that cannot fit, before it is run.

        Raises:
          OutOfMemory: XLA's plan of the step needs more than there is.
        """
        plan = step.memory_analysis()
        if plan is None or self._need is None:
            return
        total = (
            plan.argument_size_in_bytes
            + plan.output_size_in_bytes
            - plan.alias_size_in_bytes
            + plan.temp_size_in_bytes
        )
        left = max(0, total - self._need.state - self._need.gradients)
        self._check(dataclasses.replace(self._need, activations=left))

    def _check(self, need: Need) -> None:
        self._need = need
        if self._limit is not None and need.total > self._limit:
            raise OutOfMemory(
                f"Training needs {_gigabytes(need.total)} on each device, "
                f"{_gigabytes(need.state)} of it for parameters and optimizer, but a device has "
                f"{_gigabytes(self._limit)}: {advice(need, self._limit, self._cfg, self._devices)}."
            )

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns JAX's error of exhausted memory into OutOfMemory, with advice."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or self._need is None:
                raise
            asked = _asked_for(str(error))
            need = self._need
            if asked and asked > need.total:
                need = dataclasses.replace(need, activations=asked - need.of_model)
            limit = min(self._limit or need.total, int(_SURPRISE * need.total))
            raise OutOfMemory(
                f"Memory ran out ({_first_line(error)}), where the step was to need "
                f"{_gigabytes(self._need.total)} on each device: "
                f"{advice(need, limit, self._cfg, self._devices)}."
            ) from error


def advice(need: Need, limit: int, cfg: config.Config, data_devices: int) -> str:
    """Advises what to change, and how far, so that a run fits: settings joined by "or".

    What a token takes falls with the tokens that a device computes at one time; logits are bounded
    by ``config.loss.chunk_tokens`` instead, state and gradients by the model alone.

    Args:
      need: of the run as it is set.
      limit: bytes that a device has.
      cfg: all settings.
      data_devices: devices that share the batch.
    """
    room = _ROOM * limit - need.of_model
    if room <= 0:
        return _smaller_model(need, _ROOM * limit, cfg)
    ways = []
    sequences = cfg.train.batch_size // cfg.train.microbatches // data_devices
    tokens = sequences * cfg.data.seq_len
    # Logits, their softmax and their gradient, in float32.
    logits = 3 * 4 * cfg.model.vocab_size * min(cfg.loss.chunk_tokens, tokens)
    logits = min(logits, need.activations)
    of_tokens = need.activations - logits
    if logits > room / 2:
        chunk = max(1, int(cfg.loss.chunk_tokens * room / 2 / logits))
        ways.append(f"lower config.loss.chunk_tokens from {cfg.loss.chunk_tokens} to {chunk}")
        room /= 2
    else:
        room -= logits
    parts = (
        m
        for m in range(cfg.train.microbatches + 1, cfg.train.batch_size // data_devices + 1)
        if cfg.train.batch_size % (m * data_devices) == 0
        and of_tokens * cfg.train.microbatches / m <= room
    )
    # The first alone: of a large batch there are very many.
    if least := next(parts, 0):
        ways.append(f"raise config.train.microbatches from {cfg.train.microbatches} to {least}")
    layers, width = cfg.model.num_layers, cfg.model.width
    if cfg.model.remat != "layer" and of_tokens / layers + 4 * layers * tokens * width <= room:
        ways.append(f"set config.model.remat='layer' (now {cfg.model.remat!r})")
    devices = data_devices * max(1, math.ceil(of_tokens / max(room, 1)))
    if sequences > 1 and cfg.train.batch_size % (devices * cfg.train.microbatches) == 0:
        ways.append(f"share the batch among {devices} devices (config.mesh.data)")
    layers = cfg.model.moe_settings
    slots = max((moe.route.bounds(moe.num_experts).slots for moe in layers), default=1)
    if slots > 2 and not cfg.model.moe.transforms:
        ways.append(f"set config.model.moe.transforms='row_budget': 2 rows a token, not {slots}")
    if not ways:
        length = max(2, int(cfg.data.seq_len * room / max(of_tokens, 1)))
        ways.append(f"lower config.data.seq_len from {cfg.data.seq_len} to {length}")
    return ", or ".join(ways)


def _smaller_model(need: Need, limit: float, cfg: config.Config) -> str:
    """The largest models that fit with their state and gradients: one setting changed in each."""
    model = cfg.model
    affordable = count_parameters(model) * limit / need.of_model
    every, first = model.moe.every_n_layers or 1, model.moe.dense_first_layers

    def experts(n: int) -> config.Model:
        return dataclasses.replace(model, moe=dataclasses.replace(model.moe, num_experts=n))

    def expert_width(n: int) -> config.Model:
        return dataclasses.replace(model, moe=dataclasses.replace(model.moe, hidden_width=n))

    knobs = [
        ("num_layers", first, every, lambda n: {"num_layers": first + n * every}),
        ("hidden_width", 0, 1, lambda n: {"hidden_width": n}),
        ("vocab_size", 0, 1, lambda n: {"vocab_size": n + 1}),
    ]
    knobs = [(name, base, unit, partial(_replaced, model, of)) for name, base, unit, of in knobs]
    if model.layers:  # names layers by number
        knobs = knobs[1:]
    elif model.moe.every_n_layers:
        knobs = [
            ("moe.num_experts", 0, 1, experts),
            knobs[0],
            ("moe.hidden_width", 0, 1, expert_width),
            *knobs[1:],
        ]
    ways = []
    for name, base, unit, model_of in knobs:
        now = operator.attrgetter(name)(model)
        most = _largest(model_of, affordable, (now - base) // unit)
        if most:
            ways.append(f"lower config.model.{name} from {now} to {base + most * unit}")
    # Nearly all parameters grow with the width, most of them with nothing else.
    width = max(1, int(model.width * affordable / count_parameters(model)))
    ways = ways or [f"lower config.model.width from {model.width} to about {width}"]
    times = math.ceil(need.of_model / limit)
    ways = [*ways[:2], f"cut the state over {times} times as many devices (config.mesh.data)"]
    return ", or ".join(ways)


def _replaced(model: config.Model, of: Callable[[int], dict], n: int) -> config.Model:
    return dataclasses.replace(model, **of(n))


def _largest(model_of: Callable[[int], config.Model], affordable: float, now: int) -> int:
    """The most units below ``now`` that are affordable; 0 if not even one is.

    The number of parameters is linear in it, so two counts tell.
    """
    one, two = (count_parameters(model_of(n)) for n in (1, 2))
    if one == two:  # e.g. the dense width of a model whose layers are all MoE
        return 0
    most = 1 + math.floor((affordable - one) / (two - one))
    return max(0, min(most, now - 1))


@functools.lru_cache(maxsize=16)
def _state_bytes(cfg: config.Config, sizes: tuple[tuple[str, int], ...]) -> tuple[int, int]:
    """Bytes that one device has of the state, and of the parameters in it."""
    optimizer = make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, steps=1))
    init = partial(init_state, cfg, optimizer)
    state = jax.eval_shape(init, jax.random.key(0))
    return bytes_per_device(state, dict(sizes)), bytes_per_device(state.params, dict(sizes))


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 5e7 else f"{count / 1e9:.2g} GB"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _asked_for(message: str) -> int:
    """Bytes that JAX's message says were needed; 0 if it does not say.

    CPU and GPU name the allocation that failed, a TPU's compiler the whole program ("Used 25.34G
    of 15.75G hbm").
    """
    used = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    if used:
        return int(float(used[1]) * 1024 ** (1 + "KMGT".index(used[2])))
    allocation = re.search(r"allocat(?:e|ing) (\d+)(?: bytes)?", message)
    return int(allocation[1]) if allocation else 0
