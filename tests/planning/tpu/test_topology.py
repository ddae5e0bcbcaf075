"""Names of hardware, and what is said about wrong ones."""

import importlib.metadata

import jax
import pytest
from packaging.requirements import Requirement

from dynmoe_jax.config import ConfigError
from dynmoe_jax.planning.tpu.topology import describe_devices, parse_topology, why_not


@pytest.mark.parametrize(
    ("name", "chips", "devices", "is_tpu"),
    [
        ("v5p:4x4x4", 64, 64, True),
        ("v6e:8x8", 64, 64, True),
        ("tpu7x:2x2x1", 4, 8, True),
        ("h100:8", 8, 8, False),
        ("h100:4x8", 32, 32, False),
    ],
)
def test_names(name, chips, devices, is_tpu):
    topology = parse_topology(name)
    assert (topology.chips, topology.devices) == (chips, devices)
    assert topology.is_tpu == is_tpu


def test_slices_multiply_tpus_alone():
    assert parse_topology("v5p:4x4x4", slices=3).devices == 192
    assert parse_topology("h100:4x8", slices=4).devices == 32


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "such as v5p:4x4x4"),
        ("v5p", "not the name of a topology"),
        ("v5p:4by4", "not the name of a topology"),
        ("v5q:4x4x4", "'v5q' is not known; known are .* did you mean v5p"),
        ("v5p:8x8", "must give 3 numbers .* such as v5p:4x4x4"),
        ("v6e:4x4x4", "must give 2 numbers .* such as v6e:8x8"),
        ("h100:2x2x2", "must give 1 or 2 numbers"),
        ("v5p:4x4x0", "at least 1"),
    ],
)
def test_wrong_names_are_refused_in_a_sentence(name, says):
    with pytest.raises(ConfigError, match=says):
        parse_topology(name)


def test_slices_need_a_network_that_is_known():
    with pytest.raises(ConfigError, match=r"config\.mesh\.slice=2: the data-centre network of v4"):
        parse_topology("v4:2x2x2", slices=2)


def jax_asks_for():
    wanted = (Requirement(text) for text in importlib.metadata.requires("jax"))
    return next(found for found in wanted if found.name == "libtpu")


@pytest.fixture
def installed(monkeypatch):
    """Has libtpu be installed in a version, or not at all."""
    version = importlib.metadata.version

    def be(found):
        def asked(name):
            if name != "libtpu":
                return version(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr("importlib.metadata.version", asked)

    return be


@pytest.mark.parametrize("version", ["0.0.17", "0.0.99", "1.2.dev20260101+nightly"])
def test_compiler_of_another_jax_is_refused_with_the_one_to_install(version, installed):
    """It writes HLO that this jaxlib cannot read, and says so in words that nobody can act on."""
    installed(version)
    with pytest.raises(ConfigError) as caught:
        describe_devices(parse_topology("v5p:2x2x1"))
    assert str(caught.value) == (
        f"--topology: libtpu {version} is not the one that JAX {jax.__version__} asks for; "
        f"pip install 'libtpu{jax_asks_for().specifier}'."
    )


def test_compiler_that_is_not_there_is_refused_with_the_extra(installed):
    installed(None)
    with pytest.raises(
        ConfigError, match=r"its compiler is needed; pip install -e '\.\[tpu-aot\]'"
    ):
        describe_devices(parse_topology("v5p:2x2x1"))


def test_compiler_that_jax_asks_for_is_taken(installed):
    (wanted,) = jax_asks_for().specifier
    for version in (wanted.version.replace("*", "0"), wanted.version.replace("*", "7")):
        installed(version)
        assert why_not() == ""
