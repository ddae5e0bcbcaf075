"""Eight simulated devices for every test, and what makes compiling cheap, set before JAX starts."""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version

import pytest
from hypothesis import settings

pytest.register_assert_rewrite("tests.close")

# What is imported and collected is there to the end: to look through it for garbage, again and
# again, takes a quarter of the time of importing it.
gc.disable()

# A flag that XLA doesn't know ends the process.
_JAXLIB = tuple(int(part) for part in version("jaxlib").split(".")[:3])

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Tests compile much and compute little: a third of their time is spared, and with LLVM emitting
    # what MLIR would, 11 of 18 seconds of what is compiled for a run of two layers.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    + (" --xla_cpu_use_fusion_emitters=false" if _JAXLIB < (0, 11, 1) else "")
    # Programs are small, and so are their parts, each of which costs as much as a whole one.
    + " --xla_cpu_parallel_codegen_split_count=1"
)
# Where an operation was written need not be in its program: it is a twentieth of lowering it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# As programs do for themselves (dynmoe_jax/cluster/simulated.py).
os.environ.setdefault("PJRT_NPROC", "64")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Programs that tests start would start twice (dynmoe_jax/hardware/huge_pages.py).
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")

# What one test compiled no other one compiles again, in whichever process: workers of pytest-xdist,
# and programs that tests start, inherit these.
_OWN_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _OWN_CACHE = tempfile.mkdtemp(prefix="dynmoe_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _OWN_CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_addoption(parser):
    parser.addoption("--fuzz", action="store_true", help="try many more cases in tests that fuzz")
    parser.addoption("--long", action="store_true", help="run tests marked long, too")


@pytest.fixture(scope="session")
def fuzz_cases(request):
    """``fuzz_cases(few, many)``: the number of cases to try, ``many`` with ``--fuzz``."""
    return lambda few, many: many if request.config.getoption("--fuzz") else few


def pytest_configure(config):
    # The same examples each time, so that a change is to blame for what it breaks.
    settings.register_profile("fixed", derandomize=True)
    settings.load_profile("default" if config.getoption("--fuzz") else "fixed")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    # The longest files first: begun last, one of them would keep a single worker busy at the end.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    gc.freeze()
    # Traced programs are many small objects, of which most stay: every 700 are too few to look.
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_unconfigure():
    if _OWN_CACHE:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)
