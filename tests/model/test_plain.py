"""``config.model.kernels="plain"``: no kernel anywhere, and none named beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.hardware.native import library
from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.model import decoder_shapes
from dynmoe_jax.model.kernels.attention.choice import attention_of
from dynmoe_jax.training.gradients import make_gradients
from dynmoe_jax.training.loss import TrainingLoss

B, L = 4, 256
# Widths that all kernels for TPU know, and as many tokens as those for CPU want.
MODEL = config.Model(
    num_layers=1,
    width=256,
    num_heads=2,
    num_kv_heads=2,
    head_width=128,
    hidden_width=256,
    vocab_size=1024,
    max_seq_len=L,
    moe=config.MoE(num_experts=4, hidden_width=256, shared_hidden_width=256),
)


def program(kernels):
    """The gradients of a batch, as JAX traces them."""
    cfg = config.Config(
        model=dataclasses.replace(MODEL, kernels=kernels),
        data=config.Data(seq_len=L),
        train=config.Train(batch_size=B),
    )
    decoder = decoder_shapes(cfg.model)
    loss = TrainingLoss.of(cfg, decoder)
    gradients = make_gradients(cfg, nnx.graphdef(decoder), loss)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.zeros((B, L), int))
    coefficients = loss.routing.coefficients(loss.routing.initial(), jnp.int32(0))
    return str(jax.make_jaxpr(gradients)(nnx.state(decoder), batch, coefficients))


def test_nothing_on_a_tpu_is_a_kernel():
    with compile_for(Target("tpu", "TPU v5p")):
        assert program("auto").count("pallas_call") > 10
        assert "pallas_call" not in program("plain")


@pytest.mark.skipif(not library.available(), reason=str(library.why_not()))
def test_nothing_on_a_cpu_is_a_kernel(monkeypatch):
    monkeypatch.setattr(library, "has_matrix_unit", lambda: True)
    assert program("auto").count("ffi_call") > 10
    assert "ffi_call" not in program("plain")


def checked(kernels, attention="auto", grouped_product="auto"):
    moe = dataclasses.replace(MODEL.moe, grouped_product=grouped_product)
    model = dataclasses.replace(MODEL, kernels=kernels, attention=attention, moe=moe)
    return config.Config(model=model, data=config.Data(seq_len=L)).model


@pytest.mark.parametrize(
    ("setting", "name"), [("attention", "tiled"), ("moe.grouped_product", "native")]
)
def test_a_kernel_named_beside_plain_is_refused(setting, name):
    named = {setting.rsplit(".", 1)[-1]: name}
    checked("auto", **named)
    with pytest.raises(ConfigError, match=f"config.model.{setting}={name!r} names a kernel"):
        checked("plain", **named)


def test_the_plain_ones_may_be_named():
    assert attention_of(checked("plain", "xla", "blocks")) == "xla"
    assert attention_of(checked("plain")) == "xla"
    assert attention_of(checked("auto", "tiled")) == "tiled"
