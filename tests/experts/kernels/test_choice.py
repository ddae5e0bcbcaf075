"""The rule that picks an implementation, branch by branch."""

import jax.numpy as jnp
import pytest

from dynmoe_jax import config
from dynmoe_jax.experts import make_backend
from dynmoe_jax.experts.kernels import choice
from dynmoe_jax.experts.kernels.contract import XLA
from dynmoe_jax.hardware.target import Target, compile_for, current_target

CPU = Target("cpu", "cpu")
V5P = Target("tpu", "TPU v5")
H100 = Target("gpu", "NVIDIA H100 80GB HBM3", 9.0)
V100 = Target("gpu", "Tesla V100-SXM2-16GB", 7.0)
AMD = Target("gpu", "AMD Instinct MI300X")
ALL = frozenset({"native", "megablox", "tokamax", "triton"})
NONE = frozenset()


@pytest.mark.parametrize(
    ("requested", "target", "available"),
    [("xla", H100, NONE), ("blocks", V5P, NONE), ("megablox", V5P, ALL), ("tokamax", V5P, ALL)],
)
def test_what_is_asked_for_is_given(requested, target, available):
    chosen = choice.choose_products(requested, target, available, jnp.bfloat16, 1000, 2800)
    assert chosen == requested


@pytest.mark.parametrize(
    ("requested", "target", "available", "message"),
    [
        ("megablox", CPU, ALL, "'megablox' needs a TPU, and this is a CPU; use"),
        ("megablox", H100, ALL, "'megablox' needs a TPU, and this is a GPU; use"),
        ("native", H100, ALL, "'native' needs a CPU, and this is a GPU; use"),
        ("triton", CPU, ALL, "'triton' needs a GPU, and this is a CPU; use"),
        ("triton", V5P, ALL, "'triton' needs a GPU, and this is a TPU; use"),
        ("tokamax", CPU, ALL, "'tokamax' needs a GPU or TPU, and this is a CPU; use"),
        ("tokamax", H100, NONE, "'tokamax' is not installed here; install it"),
        ("megablox", V5P, NONE, "'megablox' is not installed here; update JAX"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(requested, target, available, message):
    with pytest.raises(config.ConfigError, match=message) as caught:
        choice.check_request(requested, target, available)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.model.moe.grouped_product=")


def test_native_kernels_are_refused_in_bfloat16():
    with pytest.raises(config.ConfigError, match="'native' computes in float32, not in bfloat16"):
        choice.choose_products("native", CPU, ALL, jnp.bfloat16, 1024, 2816)


@pytest.mark.parametrize(
    ("dtype", "widths", "message"),
    [
        (jnp.float32, (1024, 2816), "'triton' computes in bfloat16, not in float32; set"),
        (jnp.bfloat16, (1024, 2800), "widths that are multiples of 128, and one is 2800; change"),
    ],
)
def test_gpu_kernels_are_refused_for_numbers_they_do_not_know(dtype, widths, message):
    with pytest.raises(config.ConfigError, match=message):
        choice.choose_products("triton", H100, ALL, dtype, *widths)


def test_a_backend_that_cannot_be_is_refused_when_it_is_made():
    with pytest.raises(config.ConfigError, match="needs a TPU"):
        make_backend(config.MoE(grouped_product="megablox"), CPU)


def test_the_same_settings_give_the_same_backend():
    assert make_backend(config.MoE(), CPU) is make_backend(config.MoE(), CPU)
    assert make_backend(config.MoE(), CPU) is not make_backend(config.MoE(), V5P)


def test_another_target_within_a_context():
    at_hand = current_target()
    assert at_hand.platform == "cpu"
    with compile_for(V5P):
        assert current_target() == V5P
        assert make_backend(config.MoE()) is make_backend(config.MoE(), V5P)
    assert current_target() == at_hand


def test_names_become_products():
    assert choice.make_products("xla", H100) is XLA
    megablox = choice.make_products("megablox", V5P)
    assert megablox is choice.make_products("megablox", Target("tpu", "TPU v5p slice"))
    assert megablox.name == "megablox"
