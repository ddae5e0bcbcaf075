"""Chunks: the parts in which an array lies on disk, each of which is read as a whole.

Arrays are cut along leading axes alone, into slices that whoever goes through a model layer by
layer, or expert by expert, asks for.
"""

import math
from typing import Any

import orbax.checkpoint as ocp

SMALL_BYTES = 1 << 20
"""Chunks below this make reading slow, says Orbax."""

LARGE_BYTES = 1 << 25
"""Chunks above this make reading slices of them slow, and are cut (docs/measurements.md:
save-chunks)."""


def finest_cut(shape: tuple[int, ...], itemsize: int, most: int) -> int:
    """Number of leading axes, up to ``most``, that cut an array the finest without small chunks."""
    cuts = range(most, 0, -1)
    return next((n for n in cuts if itemsize * math.prod(shape[n:]) >= SMALL_BYTES), 0)


def coarsest_cut(shape: tuple[int, ...], itemsize: int) -> int:
    """Number of leading axes that cut an array just as fine as to have no large chunks, or else no
    small ones."""
    most = finest_cut(shape, itemsize, len(shape))
    return next((n for n in range(most) if itemsize * math.prod(shape[n:]) <= LARGE_BYTES), most)


def save_args(leaf: Any) -> ocp.SaveArgs:
    """Options for saving a leaf of a state: how it is cut.

    Args:
      leaf: an array; one that says itself by how many leading ``axes`` it is cut is taken at its
        word.
    """
    shape, itemsize = getattr(leaf, "shape", ()), getattr(leaf, "itemsize", 1)
    axes = getattr(leaf, "axes", None)
    axes = coarsest_cut(shape, itemsize) if axes is None else axes
    if not axes:
        return ocp.SaveArgs()
    slice_bytes = itemsize * math.prod(shape[axes:])
    return ocp.SaveArgs(chunk_byte_size=slice_bytes, shard_axes=tuple(range(axes)))
