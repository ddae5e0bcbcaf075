"""Tiles of the kernels for NVIDIA GPUs: what each candidate reaches, kernel by kernel.

    python -m benchmarks.gpu_tiles --rounds=10

The rows are spread evenly over the experts.  What ``dynmoe_jax/experts/kernels/gpu/tiling.py``
would choose is marked; where another candidate is clearly faster, that file should choose it.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.columns import columns
from benchmarks.command import run
from benchmarks.layer_cases import PRESETS, Preset
from benchmarks.machine import with_machine
from benchmarks.timing import interleave, show_progress
from dynmoe_jax.experts import ExpertWeights
from dynmoe_jax.experts.kernels.gpu.gmm import triton_products
from dynmoe_jax.experts.kernels.gpu.swiglu import triton_swiglu
from dynmoe_jax.experts.kernels.gpu.tiling import Tile, Tiles, tiles_for
from dynmoe_jax.hardware.target import current_target

CANDIDATES = (
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 32, 8, 4),
    Tile(256, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 4, 3),
    Tile(128, 128, 32, 4, 4),
    Tile(64, 256, 64, 4, 3),
)
ROWS_PER_TOKEN = 2
CALLS = 10
"""Of a kernel at its turn: the first waits for the host."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of the layer.

    Attributes:
      field: of :class:`Tiles`.
      products: of one row with D x F numbers.
      call: (tiles, arrays, interpret) -> what it computes.
    """

    field: str
    products: int
    call: Callable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrays:
    """What the kernels read."""

    x_RD: jax.Array
    hidden_RF: jax.Array
    gate_up_R2F: jax.Array
    weight_R1: jax.Array
    weights: ExpertWeights
    group_size_E: jax.Array


def _product(tiles, a, interpret):
    forward = triton_products(0, tiles, interpret).forward
    return forward(a.hidden_RF, a.weights.down_EFD, a.group_size_E)


def _input_gradient(tiles, a, interpret):
    backward = triton_products(0, tiles, interpret).input_gradient
    return backward(a.gate_up_R2F, a.weights.gate_up_ED2F, a.group_size_E)


def _weight_gradient(tiles, a, interpret):
    backward = triton_products(0, tiles, interpret).weight_gradient
    return backward(a.x_RD, a.gate_up_R2F, a.group_size_E)


def _swiglu(tiles, a, interpret):
    forward = triton_swiglu(tiles, interpret).forward
    return forward(a.x_RD, a.weight_R1, a.weights, a.group_size_E)


def _hidden_gradient(tiles, a, interpret):
    backward = triton_swiglu(tiles, interpret).backward
    return backward(a.x_RD, a.x_RD, a.weight_R1, a.weights, a.group_size_E, a.gate_up_R2F)


KERNELS = {
    "swiglu": Kernel("swiglu", 2, _swiglu),
    "product": Kernel("product", 1, _product),
    "hidden_gradient": Kernel("dswiglu", 1, _hidden_gradient),
    "weight_gradient": Kernel("gradient", 2, _weight_gradient),
    "input_gradient": Kernel("product", 2, _input_gradient),
}


def shapes(preset: Preset) -> Arrays:
    """Of the arrays, in bfloat16; the combine weights are float32."""
    R, D, F, E = (
        ROWS_PER_TOKEN * preset.tokens,
        preset.width,
        preset.hidden_width,
        preset.num_experts,
    )
    array = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    return Arrays(
        array((R, D)),
        array((R, F)),
        array((R, 2 * F)),
        jax.ShapeDtypeStruct((R, 1), jnp.float32),
        ExpertWeights(array((E, D, 2 * F)), array((E, F, D))),
        jax.ShapeDtypeStruct((E,), jnp.int32),
    )


def draw(preset: Preset) -> Arrays:
    """The arrays, each expert with as many rows."""

    def one(i, shape):
        if shape.dtype == jnp.int32:
            return jnp.full(shape.shape, ROWS_PER_TOKEN * preset.tokens // preset.num_experts)
        return jax.random.normal(jax.random.key(i), shape.shape, shape.dtype)

    leaves, tree = jax.tree.flatten(shapes(preset))
    return tree.unflatten([one(i, shape) for i, shape in enumerate(leaves)])


def compile_kernel(kernel: Kernel, tile: Tile, usual: Tiles, arrays: Arrays, interpret: bool):
    """The kernel with that tile.

    Raises:
      jax.errors.JaxRuntimeError: the tile does not fit.
    """
    tiles = dataclasses.replace(usual, **{kernel.field: tile})
    run = jax.jit(lambda arrays: kernel.call(tiles, arrays, interpret))
    return run.lower(arrays).compile()


def seconds_of(run: Callable, arrays: Arrays) -> float:
    """Of one of several calls."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        results = run(arrays)
    jax.block_until_ready(results)
    return (time.perf_counter() - begin) / CALLS


def measure(
    preset: Preset, names: list[str], rounds: int, interpret: bool = False
) -> tuple[list[dict], dict[str, str]]:
    """A record for each kernel and tile, and why others could not be compiled."""
    arrays = draw(preset)
    rows, experts = arrays.x_RD.shape[0], preset.num_experts
    usual = tiles_for(rows, experts, current_target().shared_bytes)
    cases, tile_of, refused = {}, {}, {}
    for name in names:
        chosen = getattr(usual, KERNELS[name].field)
        for tile in dict.fromkeys((chosen, *CANDIDATES)):
            key = f"{describe(tile)}/{name}"
            try:
                run = compile_kernel(KERNELS[name], tile, usual, arrays, interpret)
            except jax.errors.JaxRuntimeError as error:
                refused[key] = str(error).splitlines()[0]
                continue
            cases[key], tile_of[key] = partial(seconds_of, run, arrays), (name, tile, chosen)
            print(f"\r{len(cases)} compiled", end="", file=sys.stderr)
    print(file=sys.stderr)
    seconds = interleave(cases, rounds, show_progress(rounds))
    flops = 2 * rows * preset.width * preset.hidden_width
    return [
        {
            "kernel": name,
            "tile": describe(tile),
            "chosen": tile == chosen,
            "seconds": float(np.nanmedian(seconds[key])),
            "flops_per_s": flops * KERNELS[name].products / float(np.nanmedian(seconds[key])),
        }
        for key, (name, tile, chosen) in tile_of.items()
    ], refused


def describe(tile: Tile) -> str:
    """E.g. ``128x256x64, 8 warps, 3 stages``."""
    return f"{tile.m}x{tile.c}x{tile.k}, {tile.warps} warps, {tile.stages} stages"


def table(records: list[dict]) -> str:
    """Lines by kernel, the fastest tile first; what is chosen has a star."""
    lines = [("kernel", "tile (rows x columns x depth)", "ms", "TFLOP/s", "of the best")]
    for kernel in dict.fromkeys(record["kernel"] for record in records):
        own = sorted((r for r in records if r["kernel"] == kernel), key=lambda r: r["seconds"])
        lines += [
            (
                kernel,
                f"{r['tile']}{' *' if r['chosen'] else '  '}",
                f"{1e3 * r['seconds']:.3f}",
                f"{r['flops_per_s'] / 1e12:.0f}",
                f"{own[0]['seconds'] / r['seconds']:.0%}",
            )
            for r in own
        ]
    return "\n".join(columns(lines))


def main(argv: list[str]) -> dict:
    """Measures, prints the table, writes the JSON and returns what it holds."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_tiles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=("paper",), default="paper")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each that count")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure here")
    flags = parser.parse_args(argv)
    if unknown := [name for name in flags.kernels.split(",") if name not in KERNELS]:
        parser.error(f"--kernels: {unknown[0]!r} is not one of {', '.join(KERNELS)}")
    if current_target().platform != "gpu":
        parser.error("these kernels need an NVIDIA GPU, and JAX sees none")
    records, refused = measure(PRESETS[flags.preset], flags.kernels.split(","), flags.rounds)
    print("\n".join([table(records), *(f"refused: {key}: {why}" for key, why in refused.items())]))
    result = {"preset": flags.preset, "records": records, "refused": refused}
    return with_machine("benchmarks.gpu_tiles", result, flags.json)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
