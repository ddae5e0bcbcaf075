"""Eight simulated devices for every test, set before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Tests compile much and compute little: a third of their time is spared.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Programs that tests start would start twice (dynmoe_jax/huge_pages.py).
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
