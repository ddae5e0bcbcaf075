"""Eight simulated devices for every test, set before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Workers of pytest-xdist share the cores: one compiler thread each is enough.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
