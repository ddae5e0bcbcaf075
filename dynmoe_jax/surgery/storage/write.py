"""Checkpoint of a result, written while its arrays are made, one after another."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.console import Stage, stage
from dynmoe_jax.edits.places import Stored, stored_in
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.model.masks import Kept
from dynmoe_jax.runs.checkpoint import IMPORTED, Checkpoints
from dynmoe_jax.runs.saving.streamed import Index, StreamedArray
from dynmoe_jax.surgery.operation import Given, Operation
from dynmoe_jax.surgery.storage.digest import Digest
from dynmoe_jax.surgery.storage.parent import Parent
from dynmoe_jax.surgery.storage.stopping import Stopping

STEP = 0
"""A result has done no step of training of its own."""


class Digests(NamedTuple):
    """Digests of a result, see :class:`.digest.Digest`.

    Attributes:
      model: of its parameters and router states, as a parent's.
      moments: of its moments; empty without any.
    """

    model: str
    moments: str


def write_result(
    folder: Path,
    operation: Operation,
    parents: list[Parent],
    cfg: config.Config,
    *,
    name: str,
    tokenizer: str,
    seed: int,
    moments: bool,
    dtype: str,
    statistic: Callable[[str, int], np.ndarray] | None = None,
    findings: dict[int, dict[str, float]] | None = None,
) -> Digests:
    """Writes the checkpoint of a result.

    Args:
      folder: of the run that is to be.
      operation: makes the arrays.
      parents: which it makes them of.
      cfg: settings of the result.
      name: what the result is made by, in a few words.
      tokenizer: its fingerprint; empty without one.
      seed: of what is drawn.
      moments: whether the optimizer's moments are written too.
      dtype: that parameters are stored in.
      statistic: see :class:`.operation.Given`.
      findings: likewise; filled.

    Returns:
      the digests of the result.

    Raises:
      CheckpointError: a parent cannot be read, or the result cannot be written.
    """
    roles = [Role.PARAMETER, *((Role.FIRST, Role.SECOND) if moments else ())]
    digests = (Digest(), Digest())
    made_of = partial(
        Given,
        cfg.model,
        seed=seed,
        parents=tuple(parent.config.model for parent in parents),
        read_from=lambda parent, place, role: parents[parent].read(place, role),
        memo={},
        statistic=statistic,
        findings={} if findings is None else findings,
    )
    variables = list(stored_in(cfg.model))
    numbers = sum(np.prod(stored.shape) for stored, _ in variables)
    with stage(
        f"Writing {numbers / 1e6:,.1f}M parameters", len(roles) * numbers / 1e6, "M"
    ) as shown:
        maker = _Maker(operation, made_of, digests, shown)
        state = {"params": _tree(variables, maker.of(Role.PARAMETER), dtype)}
        if moments:
            trained = [each for each in variables if not isinstance(each[1], Kept)]
            state["moments"] = {
                role.value: _tree(trained, maker.of(role), "float32") for role in roles[1:]
            }
            state["moments"]["count"] = np.asarray(
                max(parent.updates for parent in parents), np.int32
            )
        position = {"tokenizer": tokenizer, IMPORTED: name}
        checkpoints = Checkpoints(folder, cfg.checkpoint)
        with maker.stopping.saving(checkpoints):
            checkpoints.save(STEP, state, position, cfg)
    model, of_moments = (digest.hex() for digest in digests)
    return Digests(model, of_moments if moments else "")


def _tree(variables, make: Callable, dtype: str) -> nnx.State:
    leaves = []
    for stored, leaf in variables:
        # A state is compared with what it was, so it is kept as it is.
        own = "float32" if isinstance(leaf, Kept) else dtype
        array = StreamedArray(stored.shape, make(stored, own), stored.leading, own)
        leaves.append((stored.path, leaf.replace(array)))
    return nnx.from_flat_state(leaves)


class _Maker:
    """Makes arrays when the checkpoint asks for them."""

    def __init__(
        self,
        operation: Operation,
        made_of: Callable[..., Given],
        digests: tuple[Digest, Digest],
        shown: Stage,
    ):
        self._operation, self._made_of = operation, made_of
        self._digests, self._shown = digests, shown
        self.stopping = Stopping()

    def of(self, role: Role) -> Callable[[Stored, str], Callable[[Index], np.ndarray]]:
        """A function of a variable, and its type on disk, that gives its slices in a role."""

        def make(stored: Stored, dtype: str, index: Index) -> np.ndarray:
            missing = stored.shape[len(index) : stored.leading]
            each = ((*index, *rest) for rest in np.ndindex(missing))
            with self.stopping.making():
                arrays = [self._array(stored, one, role, dtype) for one in each]
            return np.stack(arrays).reshape(stored.shape[len(index) :]) if missing else arrays[0]

        return lambda *variable: partial(make, *variable)

    def _array(self, stored: Stored, index: Index, role: Role, dtype: str) -> np.ndarray:
        place, shape = stored.place(index), stored.shape[stored.leading :]
        values = np.asarray(self._operation.array(place, self._made_of(shape=shape, role=role)))
        if values.shape != shape:
            raise ValueError(f"The operation makes {values.shape} for {place}, not {shape}.")
        # As it will be read, so that a result has the same digest when it is a parent.
        values = values.astype(jnp.dtype(dtype), copy=False).astype(np.float32, copy=False)
        self._digests[role is not Role.PARAMETER].add(place, role, values)
        self._shown.advance(values.size / 1e6)
        return values
