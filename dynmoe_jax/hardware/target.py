"""Target of a program: the devices at hand, or others, ahead of time.

Everything that depends on the platform (compute type, expert compute, attention) asks here, so
that a machine without a TPU can compile for one.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax

TPU_LANES = 128
"""Numbers side by side in a TPU's vector registers: what tiles of kernels are multiples of."""

TPU_TILE_ROWS = 16
"""Rows of a tile of bfloat16 in a TPU's memory."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      kind: as ``jax.Device.device_kind`` has it, e.g. ``"TPU v5"`` or ``"NVIDIA H100 80GB HBM3"``.
      compute_capability: of an NVIDIA GPU, e.g. 9.0 of Hopper; 0 of anything else.
    """

    platform: str
    kind: str = ""
    compute_capability: float = 0.0

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a program on an NVIDIA GPU may have (CUDA programming guide)."""
        if self.compute_capability in (8.0, 8.7):
            return 163 * 2**10
        return (227 if 9 <= self.compute_capability < 12 else 99) * 2**10

    @classmethod
    def of(cls, device: jax.Device) -> "Target":
        """Kind of a device, real or described by ``jax.experimental.topologies``."""
        try:
            capability = float(device.compute_capability)
        except (AttributeError, ValueError):  # ValueError: AMD's "gfx942"
            capability = 0.0
        return cls(device.platform, device.device_kind, capability)


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def current_target() -> Target:
    """Returns the target of :func:`compile_for`, otherwise that of the default device."""
    return _target.get() or Target.of(jax.devices()[0])


@contextlib.contextmanager
def compile_for(target: Target) -> Iterator[None]:
    """Within the context, models are built and traced for ``target``, whatever is at hand.

    Build and trace a model inside the same context: it keeps some choices when built and makes the
    others when traced.
    """
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)
