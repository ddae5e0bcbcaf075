"""Sharding within a model: where activations lie, and when a parameter is whole.

Outside of a mesh everything here does nothing.

Axis legend: B batch, L positions, D model width, V vocabulary, H query heads, G key/value heads, W
head width, X = H W and Y = G W heads side by side (after B alone: any axes).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dynmoe_jax.mesh.axes import (
    BATCH,
    MODEL,
    axes_of,
    batch_devices,
    mesh_axes_at,
    mesh_sizes,
    on_one_device,
    parameter_spec,
)
from dynmoe_jax.mesh.collectives import GATHERED, each_device, gathered, sum_over


def split_by_batch(x_BX: Array) -> Array:
    """Keeps the leading axis split over the batch axes of the mesh, and all others whole."""
    if on_one_device():
        return x_BX
    return jax.lax.with_sharding_constraint(x_BX, P(BATCH))


def split_columns(weight_DF: Float[Array, "D F"]) -> Float[Array, "D F"]:
    """Cuts a parameter that is whole along its last axis, over the ``model`` axis."""
    return jax.lax.with_sharding_constraint(weight_DF, P(None, MODEL))


def whole_parameter(
    name: str, parameter: Array, dtype: jnp.dtype, matrix: tuple[int, int] | None = None
) -> Array:
    """A parameter in the compute type, put together from the devices that share the batch.

    What the ``model`` axis splits stays split, but for gate and up side by side (2F), which become
    whole.  The cast comes first, so that bfloat16 travels.  Backward sums the gradient right into
    the pieces that each device keeps (reduce-scatter).

    Args:
      name: of the parameter; its letters say how it lies.
      parameter: the values.
      dtype: the compute type.
      matrix: the shape of the result; None: that of the parameter.
    """
    values = parameter.astype(dtype)
    shapes = (values.shape, matrix or values.shape)
    if on_one_device():
        return _put_together(shapes, None, values) if matrix else values
    kept = parameter_spec(name, values.shape, mesh_sizes())
    wanted = P()
    if "2F" not in axes_of(name):
        along = (mesh_axes_at(kept, dimension) for dimension in range(len(kept)))
        wanted = P(*(MODEL if MODEL in axes else None for axes in along))
    return checkpoint_name(_put_together(shapes, (kept, wanted), values), GATHERED)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _put_together(shapes: tuple, specs: tuple[P, P] | None, values: Array) -> Array:
    if specs:
        values = jax.lax.with_sharding_constraint(values, specs[1])
    return values.reshape(shapes[1])


def _put_together_forward(shapes, specs, values):
    return _put_together(shapes, specs, values), None


def _put_together_backward(shapes, specs, _, dvalues):
    if shapes[0] != shapes[1]:
        # Or XLA writes the product that makes it in the parameter's shape, which ends in heads of
        # 64, and turns both sides for it (docs/measurements.md: v5p-turned-gradient).
        dvalues = jax.lax.optimization_barrier(dvalues).reshape(shapes[0])
    if specs:
        # A custom rule: the transpose of a constraint would ask for the whole sum everywhere.
        dvalues = jax.lax.with_sharding_constraint(dvalues, specs[0])
    return (dvalues,)


_put_together.defvjp(_put_together_forward, _put_together_backward)


def embedded(
    name: str, table_VD: Float[Array, "V D"], tokens_BL: Int[Array, "B L"], dtype: jnp.dtype
) -> Float[Array, "B L D"]:
    """Rows of the embedding, in the compute type.

    On a mesh every device looks up its own tokens among the rows that it has, and the ``model``
    axis adds up what its devices found.  Backward adds up the rows of a device's own tokens before
    anything travels.
    """
    if on_one_device():
        return table_VD.astype(dtype)[tokens_BL]
    spec = parameter_spec(name, table_VD.shape, mesh_sizes())
    split_rows = MODEL in mesh_axes_at(spec, 0)

    def on_each_device(table_VD, tokens_BL):
        table_VD = gathered(table_VD, spec)
        if not split_rows:
            return table_VD[tokens_BL]
        here_BL = tokens_BL - jax.lax.axis_index(MODEL) * table_VD.shape[0]
        found_BL1 = ((here_BL >= 0) & (here_BL < table_VD.shape[0]))[..., None]
        x_BLD = jnp.where(found_BL1, table_VD.at[here_BL].get(mode="clip"), 0)
        return sum_over(x_BLD, MODEL)

    look_up = each_device(on_each_device, (spec, P(BATCH)), P(BATCH))
    return look_up(table_VD.astype(dtype), tokens_BL)


def by_token(
    function: Callable[..., Any], tokens: Any, shared: Any = (), whole: bool = False
) -> Any:
    """``function(tokens, shared)`` on the tokens of each device.

    The partitioner does not split a top-k on CPU: every device would route all tokens.

    Args:
      function: of arrays with leading tokens, [T, ...], and others; every axis that leads in a
        result is put together over devices: of tokens, or of one sum of each device.
      tokens: arrays [T, ...].
      shared: arrays that all devices have.
      whole: every device computes all tokens, and keeps its own; for what cannot be cut.
    """
    if on_one_device():
        return function(tokens, shared)
    if whole:
        together = jax.lax.with_sharding_constraint((tokens, shared), P())
        return jax.tree.map(_cut, function(*together))
    return each_device(function, (P(BATCH), P()), P(BATCH))(tokens, shared)


def _cut(x_X: Array) -> Array:
    """Splits the leading axis over the batch axes where it can be."""
    if x_X.shape[0] % batch_devices(mesh_sizes()):
        return x_X
    return jax.lax.with_sharding_constraint(x_X, P(BATCH))


def by_batch_and_head(
    mix: Callable[..., Float[Array, "B L X"]],
    query_BLX: Float[Array, "B L X"],
    key_BLY: Float[Array, "B L Y"],
    value_BLY: Float[Array, "B L Y"],
    positions: Any,
) -> Float[Array, "B L X"]:
    """Attention on the sequences and heads of each device: the partitioner cannot split kernels.

    Args:
      mix: takes the other arguments.
      query_BLX: queries.
      key_BLY: keys.
      value_BLY: values.
      positions: arrays of positions, [B, L, ...].
    """
    arrays = (query_BLX, key_BLY, value_BLY, positions)
    if on_one_device():
        return mix(*arrays)
    heads = P(BATCH, None, MODEL)
    return each_device(mix, (heads, heads, heads, P(BATCH)), heads)(*arrays)
