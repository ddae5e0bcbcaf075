"""Threads enough for simulated devices, as many of one CPU as are asked for."""

import os
import re

import jax

THREADS = "PJRT_NPROC"
"""Environment variable that XLA for CPU asks for the number of its threads; else it has one for
each core or device."""

THREADS_OF_DEVICE = 8
_FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def provide_threads() -> None:
    """Lets XLA have more threads than simulated devices; without those, nothing happens.

    A collective holds a thread while it waits for the other devices, and a device runs collectives
    that do not depend on each other at once.  With a thread for each device some hold two, the last
    one gets none, and all wait until XLA ends the process (docs/measurements.md:
    simulated-devices-stall).

    To be called before JAX looks for devices.  ``PJRT_NPROC`` that is set already stays.
    """
    flags = _FLAG.findall(os.environ.get("XLA_FLAGS", ""))
    asked = jax.config.jax_num_cpu_devices
    devices = asked if asked > 0 else int(flags[-1]) if flags else 1
    if devices > 1:
        os.environ.setdefault(THREADS, str(THREADS_OF_DEVICE * devices))
