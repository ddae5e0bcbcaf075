"""Cost of an operation before it begins, by arithmetic.

Axis legend: D model width.
"""

import dataclasses
import math

from dynmoe_jax.calibration.logits import COLUMNS_AT_ONCE, TOKENS_AT_ONCE
from dynmoe_jax.edits.places import stored_in
from dynmoe_jax.surgery.request import Job
from dynmoe_jax.surgery.size import size_of

_READ_RATE, _WRITE_RATE = 4e8, 2.5e8
_FLOPS = 5e10
_START_SECONDS, _START_BYTES = 12.0, 6e8
"""Rates of two cores and their disk, and what starting and compiling takes: orders of magnitude."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of an operation.

    Attributes:
      seconds: of all of it.
      peak_bytes: of memory.
      read_bytes: from disk.
      written_bytes: to disk.
    """

    seconds: float
    peak_bytes: float
    read_bytes: int
    written_bytes: int


def cost_of(job: Job) -> Cost:
    """The cost of an operation on this machine, roughly."""
    roles = 3 if job.moments else 1
    dtype = job.asked.options.dtype
    befores, after = [size_of(p.config) for p in job.parents], size_of(job.cfg, dtype)
    read = sum(before.stored_bytes for before in befores) * roles
    written = after.stored_bytes + (roles - 1) * size_of(job.cfg).stored_bytes
    tokens = job.asked.options.tokens
    flops = tokens * (befores[0].flops_per_token + after.flops_per_token)
    flops += job.price.flops if job.price else 0.0
    # Parents are read once more for their digest, and both models once more to measure them.
    seconds = _START_SECONDS + flops / _FLOPS + 3 * read / _READ_RATE + 2 * written / _WRITE_RATE
    model = job.cfg.model
    layers = [
        4 * math.prod(stored.shape) // max(len(stored.layers), 1)
        for stored, _ in stored_in(model)
        if stored.layers
    ]
    widest = sum(layers) / max(len({stored.layers for stored, _ in stored_in(model)}) - 1, 1)
    hidden = 2 * 4 * tokens * model.width
    logits = 2 * 4 * TOKENS_AT_ONCE * COLUMNS_AT_ONCE
    head = 2 * 4 * model.vocab_size * model.width
    calibration = job.price.bytes if job.price else 0
    most = max(2 * widest + hidden + logits + head, calibration)
    return Cost(seconds, _START_BYTES + most, read, written)
