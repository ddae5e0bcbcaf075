"""tokamax's products, lowered for an NVIDIA GPU that is not there: kernels, and nothing else."""

import re
import sys

import jax
import jax.numpy as jnp
import pytest

from dynmoe_jax.experts.kernels.gpu.tokamax import tokamax_products

tokamax = pytest.importorskip("tokamax", reason="tokamax is not installed: pip install tokamax")

R, E, INNER, OUTER = 512, 4, 128, 256


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("product", "left", "right"),
    [
        ("forward", (R, INNER), (E, INNER, OUTER)),
        ("input_gradient", (R, OUTER), (E, INNER, OUTER)),
        ("weight_gradient", (R, INNER), (R, OUTER)),
    ],
)
def test_products_are_kernels_on_gpu(monkeypatch, product, left, right):
    # tokamax would read its flags from there.
    monkeypatch.setattr(sys, "argv", ["train.py", "--config=configs/quickstart.py"])
    run = jax.jit(getattr(tokamax_products("gpu"), product))
    with tokamax.config.cross_compile(True):
        traced = run.trace(array(*left), array(*right), array(E, dtype=jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"custom_call @(\S+?)\(", text) == ["__gpu$xla.gpu.triton"]
    assert "stablehlo.dot_general" not in text
    assert "ragged_dot" not in re.sub(r'"[^"]*"', "", text)
