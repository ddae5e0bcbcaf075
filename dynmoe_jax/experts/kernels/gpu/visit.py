"""Visit of a row tile: what all GPU kernels of experts share, rows times their expert's matrices.

Axis legend: R rows, E experts, V visits, I inner width, and the tile sizes m along rows, c along
the columns of the result and k along what is summed over.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dynmoe_jax.experts.kernels.gpu.tiling import Tile
from dynmoe_jax.hardware.triton import dot

PANEL_BYTES = 16 * 2**20
"""Bytes of an expert's matrix that are worked on while the rows go by: they have to stay in the L2
cache (docs/measurements.md: gpu-l2-cache), beside the rows."""

Ref = Any
"""A reference of Pallas; the suffix of its name gives its axes."""


@dataclasses.dataclass(frozen=True)
class Visit:
    """Row tile of one program, which reads it from the arrays of ``visits_of``.

    Attributes:
      tile: its sizes.
      expert: whose rows these are.
      first: of its rows.
      end: of the rows of the expert.
      column_tile: which tile of columns the program computes.
    """

    tile: Tile
    expert: jax.Array
    first: jax.Array
    end: jax.Array
    column_tile: jax.Array

    @classmethod
    def of(cls, tile: Tile, expert_V: Ref, first_V: Ref, end_V: Ref) -> "Visit":
        """The visit of the current program, in a grid of :func:`grid_of`."""
        v = pl.program_id(1)
        column_tile = pl.program_id(2) * pl.num_programs(0) + pl.program_id(0)
        return cls(tile, expert_V[v], first_V[v], end_V[v], column_tile)

    @property
    def exists(self) -> jax.Array:
        """Fewer row tiles may be used than there are visits."""
        return self.first < self.end

    @property
    def row_m(self) -> jax.Array:
        """Its rows; the expert's last one again in place of rows beyond it, which hold anything."""
        return jnp.minimum(self._own_m, self.end - 1)

    def columns(self, first: int = 0) -> pl.Slice:
        """Column slice of this tile; tiles start at column ``first``."""
        return pl.ds(first + self.column_tile * self.tile.c, self.tile.c)

    def sums(
        self, x_RI: Ref, matrices: Sequence[Callable[[Any], Ref]], transposed: bool = False
    ) -> list[jax.Array]:
        """Multiplies the rows by a tile of each matrix, float32.

        Args:
          x_RI: all rows.
          matrices: a slice of I -> the tile of a matrix there, [k, c], or [c, k] if ``transposed``.
          transposed: see there.
        """
        k, row_m = self.tile.k, self.row_m

        def add(i, sums_mc):
            ks = pl.ds(i * k, k)
            x_mk = plgpu.load(at(x_RI, row_m, ks))
            return [
                sum_mc + dot(x_mk, plgpu.load(matrix(ks)), trans_b=transposed)
                for sum_mc, matrix in zip(sums_mc, matrices, strict=True)
            ]

        zeros_mc = jnp.zeros((self.tile.m, self.tile.c), jnp.float32)
        return jax.lax.fori_loop(0, x_RI.shape[1] // k, add, [zeros_mc] * len(matrices))

    def load(self, y_RO: Ref, columns: Any) -> jax.Array:
        """Loads the rows of a tile of columns, float32."""
        return plgpu.load(at(y_RO, self.row_m, columns)).astype(jnp.float32)

    def store(self, y_RO: Ref, columns: Any, y_mc: jax.Array) -> None:
        """Writes the rows of a tile of columns, and none that belong to others."""
        row_m = self._own_m
        mask_m1 = (row_m < self.end)[:, None]
        plgpu.store(at(y_RO, row_m, columns), y_mc.astype(y_RO.dtype), mask=mask_m1)

    def store_numbers(self, y_JR: Ref, y_m: jax.Array) -> None:
        """Writes one number for each row, beside those of the programs for other columns."""
        row_m = self._own_m
        plgpu.store(y_JR.at[self.column_tile, row_m], y_m, mask=row_m < self.end)

    @property
    def _own_m(self):
        return self.first + jnp.arange(self.tile.m)


def at(x_RI: Ref, row_m: jax.Array, columns: pl.Slice) -> Ref:
    """Some rows, in a slice of the columns: by arrays both, for interpret mode knows no mixture."""
    return x_RI.at[row_m[:, None], (columns.start + jnp.arange(columns.size))[None, :]]


def grid_of(column_tiles: int, visits: int, bytes_of_tile: int) -> tuple[int, int, int]:
    """Programs in the order in which they start: tiles of a panel, visits, panels.

    The tiles of a panel of an expert's matrix stay in the L2 cache while all its rows go by, and
    each row tile is read from memory once for a panel.

    Args:
      column_tiles: of a matrix.
      visits: V.
      bytes_of_tile: of a matrix, over the whole inner width.
    """
    fits = max(1, PANEL_BYTES // bytes_of_tile)
    panel = max(n for n in range(1, min(column_tiles, fits) + 1) if column_tiles % n == 0)
    return panel, visits, column_tiles // panel
