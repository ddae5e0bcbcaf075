"""Whether the kernels for NVIDIA GPUs compute on this one what their twins do: run it first.

    python -m benchmarks.gpu_check

Each kernel in bfloat16 against its twin in float32 on the same numbers; an error is the norm of the
difference over that of the twin's result.  Exit code 1 if one is too large.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.columns import columns
from benchmarks.command import run
from dynmoe_jax.experts import ExpertWeights
from dynmoe_jax.experts.kernels.contract import REFERENCE
from dynmoe_jax.experts.kernels.gpu.gmm import triton_products
from dynmoe_jax.experts.kernels.gpu.swiglu import triton_swiglu
from dynmoe_jax.experts.kernels.gpu.tiling import tiles_for
from dynmoe_jax.experts.kernels.swiglu import plain_swiglu
from dynmoe_jax.hardware.target import current_target
from dynmoe_jax.model.kernels.attention.api import xla_attention
from dynmoe_jax.model.kernels.attention.triton import triton_attention

MOST = 1e-2
"""A number of bfloat16 is off by up to 2^-9, a sum of products of such by less of its size."""

R, E, D, F = 4096, 8, 256, 384
B, L, H, G, W = 2, 1024, 4, 2, 64

Case = tuple[str, jax.Array, jax.Array]


def draw(number: int, *shape: int) -> jax.Array:
    """Numbers of bfloat16, small enough that nothing saturates."""
    return (jax.random.normal(jax.random.key(number), shape) / 8).astype(jnp.bfloat16)


def expert_cases(rows: int, interpret: bool = False) -> Iterator[Case]:
    """(name, kernel's result, twin's result), each for the rows used; one expert has none."""
    memory = current_target().shared_bytes
    share = rows // (2 * E)
    sizes = [share * (i % 4) for i in range(E)]
    group_size_E, used = jnp.array(sizes, jnp.int32), sum(sizes)
    weights = ExpertWeights(draw(0, E, D, 2 * F), draw(1, E, F, D))
    x_RD, dy_RD, weight_R1 = draw(2, rows, D), draw(3, rows, D), draw(4, rows, 1)
    hidden_RF, gate_up_R2F = draw(5, rows, F), draw(6, rows, 2 * F)
    products = triton_products(memory, interpret=interpret)
    for name, left, right in (
        ("forward", hidden_RF, weights.down_EFD),
        ("input_gradient", gate_up_R2F, weights.gate_up_ED2F),
        ("weight_gradient", x_RD, gate_up_R2F),
    ):
        actual, wanted = _both(
            getattr(products, name), getattr(REFERENCE, name), left, right, group_size_E
        )
        whole = name == "weight_gradient"
        yield name, *((actual, wanted) if whole else (actual[:used], wanted[:used]))
    kernels = triton_swiglu(tiles_for(rows, E, memory), interpret)

    def passes(swiglu, x_RD, dy_RD, weight_R1, gate_up_ED2F, down_EFD):
        given = weight_R1, ExpertWeights(gate_up_ED2F, down_EFD), group_size_E
        hidden_RF, kept_R2F = swiglu.forward(x_RD, *given)
        return hidden_RF, *swiglu.backward(x_RD, dy_RD, *given, kept_R2F)

    twin = plain_swiglu(REFERENCE)
    operands = x_RD, dy_RD, weight_R1, weights.gate_up_ED2F, weights.down_EFD
    found = _both(partial(passes, kernels), partial(passes, twin), *operands)
    names = "swiglu", "hidden again", "gradient of gate and up", "gradient of combine weights"
    for name, actual, wanted in zip(names, *found, strict=True):
        yield name, actual[:used], wanted[:used]


def attention_cases(length: int, interpret: bool = False) -> Iterator[Case]:
    """The same of attention and its gradients, on two documents and padding."""
    query, key, value, mix = (
        draw(10 + i, B, length, heads, W) for i, heads in enumerate((H, G, G, H))
    )
    ends = jnp.array([length // 3, length - 40])
    segment_ids_BL = jnp.broadcast_to(
        jnp.sum(jnp.arange(length)[:, None] >= ends, axis=-1), (B, length)
    ).astype(jnp.int32)

    def passes(attend, query, key, value, mix):
        mixed, pull_back = jax.vjp(lambda *x: attend(*x, segment_ids_BL), query, key, value)
        return mixed, *pull_back(mix)

    attend = partial(triton_attention, interpret=interpret)
    found = _both(partial(passes, attend), partial(passes, xla_attention), query, key, value, mix)
    names = "attention", "gradient of queries", "gradient of keys", "gradient of values"
    yield from zip(names, *found, strict=True)


def _both(kernel: Callable, twin: Callable, *operands: jax.Array):
    """What a kernel makes of bfloat16, and its twin of the same numbers in float32, exactly."""
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in operands]
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(twin)(*wide)
    return jax.jit(kernel)(*operands), wanted


def error(actual: jax.Array, wanted: jax.Array) -> float:
    """Norm of the difference over the norm; NaN counts as infinitely large."""
    difference = actual.astype(jnp.float32) - wanted
    found = float(jnp.linalg.norm(difference) / jnp.linalg.norm(wanted))
    return found if found == found else float("inf")


def main(argv: list[str]) -> int:
    """Prints the errors; 1 if one is too large."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    if current_target().platform != "gpu":
        parser.error("these kernels need an NVIDIA GPU, and JAX sees none")
    cases = [*expert_cases(R), *attention_cases(L)]
    errors = {name: error(actual, wanted) for name, actual, wanted in cases}
    rows = [("kernel", "error", "")]
    rows += [(n, f"{e:.1e}", "" if e <= MOST else "TOO LARGE") for n, e in errors.items()]
    print("\n".join(columns(rows)))
    return int(max(errors.values()) > MOST)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
