"""Checkpoint of a result, written while its arrays are made, one after another."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.console import Stage, stage
from dynmoe_jax.edits.places import Stored, stored_in
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.model.components import RouterState
from dynmoe_jax.runs.checkpoint import IMPORTED, Checkpoints
from dynmoe_jax.runs.saving.streamed import Index, StreamedArray
from dynmoe_jax.surgery.digest import Digest
from dynmoe_jax.surgery.operation import Given, Operation
from dynmoe_jax.surgery.parent import Parent

STEP = 0
"""A result has done no step of training of its own."""


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
) -> str:
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

    Returns:
      the digest of the result.
    """
    roles = [Role.PARAMETER, *((Role.FIRST, Role.SECOND) if moments else ())]
    digest, memo = Digest(), {}
    variables = list(stored_in(cfg.model))
    numbers = sum(np.prod(stored.shape) for stored, _ in variables)
    with (
        stage(
            f"Writing {numbers / 1e6:,.1f}M parameters", len(roles) * numbers / 1e6, "M"
        ) as shown,
        contextlib.closing(Checkpoints(folder, cfg.checkpoint)) as checkpoints,
    ):
        maker = _Maker(operation, parents, cfg.model, seed, digest, memo, shown)
        state = {"params": _tree(variables, maker.of(Role.PARAMETER), dtype)}
        if moments:
            trained = [each for each in variables if not isinstance(each[1], RouterState)]
            state["moments"] = {
                role.value: _tree(trained, maker.of(role), "float32") for role in roles[1:]
            }
            state["moments"]["count"] = np.asarray(
                max(parent.updates for parent in parents), np.int32
            )
        position = {"tokenizer": tokenizer, IMPORTED: name}
        checkpoints.save(STEP, state, position, cfg)
    return digest.hex()


def _tree(variables, make: Callable, dtype: str) -> nnx.State:
    leaves = []
    for stored, leaf in variables:
        # A state is compared with what it was, so it is kept as it is.
        own = "float32" if isinstance(leaf, RouterState) else dtype
        array = StreamedArray(stored.shape, make(stored), stored.leading, own)
        leaves.append((stored.path, leaf.replace(array)))
    return nnx.from_flat_state(leaves)


class _Maker:
    """Makes arrays when the checkpoint asks for them."""

    def __init__(
        self,
        operation: Operation,
        parents: list[Parent],
        model: config.Model,
        seed: int,
        digest: Digest,
        memo: dict,
        shown: Stage,
    ):
        self._operation, self._parents, self._model = operation, parents, model
        self._seed, self._digest, self._memo, self._shown = seed, digest, memo, shown

    def of(self, role: Role) -> Callable[[Stored], Callable[[Index], np.ndarray]]:
        """A function of a variable that gives its slices in a role."""

        def make(stored: Stored, index: Index) -> np.ndarray:
            missing = stored.shape[len(index) : stored.leading]
            arrays = [self._array(stored, (*index, *rest), role) for rest in np.ndindex(missing)]
            return np.stack(arrays).reshape(stored.shape[len(index) :]) if missing else arrays[0]

        return lambda stored: lambda index: make(stored, index)

    def _array(self, stored: Stored, index: Index, role: Role) -> np.ndarray:
        place, shape = stored.place(index), stored.shape[stored.leading :]
        given = Given(
            self._model,
            shape,
            role,
            self._seed,
            len(self._parents),
            lambda parent, place, role: self._parents[parent].read(place, role),
            self._memo,
        )
        values = np.asarray(self._operation.array(place, given))
        if values.shape != shape:
            raise ValueError(f"The operation makes {values.shape} for {place}, not {shape}.")
        self._digest.add(place, role, values)
        self._shown.advance(values.size / 1e6)
        return values
