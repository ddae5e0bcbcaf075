"""Kernels that go through an array of tokens once, tile by tile.

All that a tile of tokens needs is in VMEM at one time, so arithmetic that XLA would spread over
several passes is one.

Axis legend: T tokens, D model width, N tiles of tokens.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from dynmoe_jax.hardware.target import TPU_LANES, TPU_TILE_ROWS, current_target
from dynmoe_jax.hardware.vmem import TOKEN_TILE_ELEMENTS
from dynmoe_jax.mesh.axes import BATCH, batch_devices, mesh_sizes, on_one_device
from dynmoe_jax.mesh.collectives import each_device


def runs_on_tiles(x_TD: Array) -> bool:
    """Whether kernels can go through the tokens that each device has of an array [..., D].

    On TPU, if D is a multiple of 128 and tiles of tokens divide those of a device.
    """
    tokens = x_TD.size // x_TD.shape[-1] // batch_devices(mesh_sizes())
    return current_target().platform == "tpu" and token_tile(tokens, x_TD.shape[-1]) > 0


def token_tile(tokens: int, width: int) -> int:
    """Tokens of a tile; 0 if there is none that fits."""
    tile = TOKEN_TILE_ELEMENTS // width // TPU_TILE_ROWS * TPU_TILE_ROWS
    while tile and tokens % tile:
        tile -= TPU_TILE_ROWS
    return 0 if width % TPU_LANES else tile


def on_tokens(run: Callable, arrays: int, whole: int = 1) -> Callable:
    """A function of arrays of tokens and of what is whole, on the tokens of each device."""
    if on_one_device():
        return run
    return each_device(run, (*(P(BATCH),) * arrays, *(P(),) * whole), P(BATCH))


def over_tiles(
    name: str,
    body: Callable,
    arrays: Sequence[Array],
    whole: Sequence[Array],
    interpret: bool = False,
    sums: bool = False,
) -> list[Array]:
    """Runs a body on tiles of tokens; it makes rows like those of the first array.

    Args:
      name: of the kernel.
      body: gets a tile of each array, what is whole, and what it makes.
      arrays: [..., width], of all tokens.
      whole: matrices that every tile needs.
      interpret: run it on a CPU, for tests.
      sums: it makes a row for each tile too, [N, 1, D], float32.
    """
    D, dtype = arrays[0].shape[-1], arrays[0].dtype
    arrays = [array.reshape(-1, array.shape[-1]) for array in arrays]
    T = arrays[0].shape[0]
    tile = token_tile(T, D)

    def rows(width):
        return pl.BlockSpec((tile, width), lambda n: (n, 0))

    specs, shapes = [rows(D)], [jax.ShapeDtypeStruct((T, D), dtype)]
    if sums:
        specs.append(pl.BlockSpec((1, 1, D), lambda n: (n, 0, 0)))
        shapes.append(jax.ShapeDtypeStruct((T // tile, 1, D), jnp.float32))
    moved = sum(a.size * a.dtype.itemsize for a in (*arrays, *whole, shapes[0]))
    products = sum(2 * T * matrix.size for matrix in whole if matrix.shape[0] > 1)
    return pl.pallas_call(
        body,
        grid=(T // tile,),
        in_specs=[
            *(rows(array.shape[1]) for array in arrays),
            *(pl.BlockSpec(matrix.shape, lambda n: (0, 0)) for matrix in whole),
        ],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=4 * len(arrays) * T * D + products, transcendentals=T, bytes_accessed=moved
        ),
        name=name,
        interpret=interpret,
    )(*arrays, *whole)
