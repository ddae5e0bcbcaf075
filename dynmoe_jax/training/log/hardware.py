"""Peak arithmetic rates, which utilisation is measured against."""

import functools
import time

import jax
import jax.numpy as jnp

from dynmoe_jax.hardware.chips import chip_of


def peak_flops_per_second() -> float:
    """Peak FLOP/s of all devices together.

    A device that is no known chip (a CPU, say) counts with what a large float32 matrix product
    reaches on it.  The CPU devices of a process share one host, so they count as one.  Processes
    count as if each had a host of its own.
    """
    devices = jax.devices()
    chip = chip_of(devices[0].device_kind)
    if chip:
        return chip.flops_per_s * len(devices)
    count = jax.process_count() if devices[0].platform == "cpu" else len(devices)
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
