"""Peak arithmetic rates, which utilisation is measured against."""

import functools
import time

import jax
import jax.numpy as jnp

PEAK_BFLOAT16_FLOPS = {
    # Dense bf16 FLOP/s of one device, from the makers' data sheets.
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops_per_second() -> float:
    """Peak FLOP/s of all devices together.

    A device that is not in the table (a CPU, say) counts with what a large float32 matrix product
    reaches on it.  The CPU devices of a process share one host, so they count as one.
    """
    devices = jax.devices()
    kind = devices[0].device_kind
    # The longest name first: "TPU v5 lite" is not a "TPU v5".
    for name in sorted(PEAK_BFLOAT16_FLOPS, key=len, reverse=True):
        if name in kind:
            return PEAK_BFLOAT16_FLOPS[name] * len(devices)
    count = 1 if devices[0].platform == "cpu" else len(devices)
    return measured_matmul_flops_per_second() * count


@functools.cache
def measured_matmul_flops_per_second(size: int = 1536, repeats: int = 5) -> float:
    """The best FLOP/s of ``repeats`` float32 products of two [size, size] matrices."""
    product = jax.jit(lambda a, b: a @ b)
    a = jnp.ones((size, size), jnp.float32)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
